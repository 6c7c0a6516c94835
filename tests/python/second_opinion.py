#!/usr/bin/env python3
"""Compares ENVELOPE and BODYSTRUCTURE of every message of a mailbox with what Python's email package makes of the message.

    second_opinion.py PORT USER PASSWORD MAILBOX

The server is on the loopback interface. Exits with 1 if anything differs that KNOWN does not explain. Only the standard library
is used; email and this script share no code with the server.
"""

import base64
import collections
import email
import email._parseaddr
import email.errors
import email.generator
import email.header
import email.message
import email.policy
import email.utils
import imaplib
import io
import re
import sys

# What is known to differ, and why the server is right or free. Anything else fails.
KNOWN = {
    "email reads on after a header line that is none":
        "a line without a colon ends the header for email (with a defect); here the header ends with its empty line",
    "email keeps a multipart without parts":
        "body-type-mpart needs a part: here a multipart without a boundary is text, and one without parts has one text",
    "email takes another address":
        "not an address by RFC 5322; email._parseaddr drops or joins what it does not understand",
    "email shortens a part without its end":
        "where the closing delimiter is missing, email drops the last line end of the last part as if it belonged to one",
    "email flattens a message within differently":
        "the generator does not keep the white space of header fields; there is no other way to ask for their octets",
}


class Atom(str):
    """NIL, a number or a flag."""


def parse(tokens):
    """One value of a response: a string, an atom or a list."""
    token = next(tokens)
    if token != b"(":
        return token
    values = []
    while True:
        value = parse(tokens)
        if value == b")" and isinstance(value, Symbol):
            return values
        values.append(value)


class Symbol(bytes):
    """A parenthesis."""


def tokens(pieces):
    """The tokens of a FETCH response as imaplib gives it: pieces of text, and pairs of text and a literal."""
    for piece in pieces:
        text, literal = piece if isinstance(piece, tuple) else (piece, None)
        if literal is not None:
            text = text[: text.rindex(b"{")]
        at = 0
        while at < len(text):
            octet = text[at : at + 1]
            if octet in b"()":
                yield Symbol(octet)
                at += 1
            elif octet == b" ":
                at += 1
            elif octet == b'"':
                match = re.compile(rb'"((?:[^"\\]|\\.)*)"').match(text, at)
                yield re.sub(rb"\\(.)", rb"\1", match.group(1))
                at = match.end()
            else:
                match = re.compile(rb"[^ ()]+").match(text, at)
                atom = match.group()
                yield None if atom == b"NIL" else Atom(atom.decode())
                at = match.end()
        if literal is not None:
            yield literal


def unfold(value):
    return re.sub(rb"[\r\n]", b"", value).strip(b" \t\r\n")


def octets(text):
    return text.encode("ascii", "surrogateescape")


def field(message, name):
    """The octets of the first field of a name, unfolded, or None."""
    for found, value in message.raw_items():
        if found.strip().lower() == name:
            return unfold(octets(value))
    return None


def plain(value):
    """A string of a response as it stands in the message: 8-bit text comes as encoded words (RFC 3501 has no 8-bit strings)."""
    if value is None:
        return None
    words = value.split(b" ")
    if all(re.fullmatch(rb"=\?(UTF-8|unknown-8bit)\?B\?[A-Za-z0-9+/=]+\?=", word) for word in words):
        decoded = b"".join(base64.b64decode(word.split(b"?")[3]) for word in words)
        if any(octet >= 0x80 for octet in decoded):
            return decoded
    return value


def name_of(text):
    """A display name, for comparison: without quotes, comments and white space."""
    return re.sub(rb"\([^()]*\)|[\s\"\\]", b"", text)


class Differences:
    def __init__(self):
        self.known = collections.Counter()
        self.wrong = []
        self.compared = 0

    def compare(self, where, what, ours, theirs, known=None):
        self.compared += 1
        if ours == theirs:
            return True
        if known:
            self.known[known] += 1
        else:
            self.wrong.append(f"{where}: {what}: {ours!r}, email says {theirs!r}")
        return False


def compare_addresses(d, where, what, ours, value):
    """An address list: groups without their marks, names without comments."""
    theirs = email._parseaddr.AddressList(value.decode("latin-1")).addresslist if value else []
    theirs = [(name_of(plain(name.encode("latin-1"))), address.encode("latin-1")) for name, address in theirs if address or name]
    found = []
    for name, _, mailbox, host in ours or []:
        if host is None:
            continue  # the start or the end of a group
        address = plain(mailbox) + (b"@" + plain(host) if host else b"")
        found.append((name_of(plain(name) or b""), address))
    # A quoted local part and white space around dots mean the same.
    squeeze = lambda pairs: [(name, re.sub(rb"[\s\"\\]", b"", address)) for name, address in pairs]
    simple = rb'\s*(("[^"\\]*"|[^\s()<>@,:;"\\][^()<>@,:;"\\]*)?\s*<[^][\s()<>@,:;"\\]+@[^][\s()<>@,:;"\\]+>|[^][\s()<>@,:;"\\]+@[^][\s()<>@,:;"\\]+)\s*'
    is_simple = re.fullmatch(simple + rb"(," + simple + rb")*,?", value or b"")
    known = None if is_simple or not value else "email takes another address"
    d.compare(where, what, squeeze(found), squeeze(theirs), known)


def compare_envelope(d, where, ours, message):
    for position, name in ((0, "date"), (1, "subject"), (8, "in-reply-to"), (9, "message-id")):
        d.compare(where, name, plain(ours[position]), plain(field(message, name)))
    senders = field(message, "from")
    for position, name in ((2, "from"), (3, "sender"), (4, "reply-to"), (5, "to"), (6, "cc"), (7, "bcc")):
        value = field(message, name)
        if position in (3, 4) and not (value or b"").strip():
            value = senders  # RFC 3501, 7.4.2
        if position in (3, 4) and value and not email._parseaddr.AddressList(value.decode("latin-1")).addresslist:
            value = senders
        compare_addresses(d, where, name, ours[position], value)


def parameters(value):
    """The parameters of a field as they stand there, names in lower case."""
    found = []
    _, semicolon, rest = value.decode("latin-1").partition(";")
    for parameter in email.message._parseparam(semicolon + rest):
        name, equals, text = parameter.partition("=")
        if not equals:
            continue
        text = text.strip()
        if text.startswith('"') and text.endswith('"'):
            text = re.sub(r"\\(.)", r"\1", text[1:-1])
        found.append((name.strip().lower().encode("latin-1"), text.encode("latin-1")))
    return found


def our_parameters(list_):
    list_ = list_ or []
    return [(plain(name).lower(), plain(value)) for name, value in zip(list_[::2], list_[1::2])]


def flattened(message):
    out = io.BytesIO()
    policy = email.policy.compat32.clone(linesep="\r\n", max_line_length=0)
    email.generator.BytesGenerator(out, mangle_from_=False, policy=policy).flatten(message)
    return out.getvalue()


def compare_extension(d, where, ours, message):
    """body-fld-dsp, body-fld-lang, body-fld-loc"""
    disposition = field(message, "content-disposition")
    token = re.match(rb"[^\s;()]*", disposition or b"").group().lower()
    if token:
        if d.compare(where, "disposition", ours[0] and ours[0][0].lower(), token):
            d.compare(where, "disposition parameters", our_parameters(ours[0][1]), parameters(disposition))
    else:
        d.compare(where, "disposition", ours[0], None)
    language = field(message, "content-language")
    tags = [tag.strip() for tag in language.split(b",") if tag.strip()] if language else []
    ours_tags = ours[1] if isinstance(ours[1], list) else [ours[1]] if ours[1] else []
    d.compare(where, "language", ours_tags, tags)
    d.compare(where, "location", plain(ours[2]), field(message, "content-location"))


def compare_body(d, where, ours, message, unclosed=False):
    if ours and isinstance(ours[0], list):
        count = sum(isinstance(part, list) for part in ours[: next(i for i, v in enumerate(ours) if not isinstance(v, list))])
        parts, rest = ours[:count], ours[count:]
        if not message.is_multipart() or message.get_content_maintype() != "multipart":
            known = "email keeps a multipart without parts" if message.get_content_maintype() == "multipart" else None
            d.compare(where, "multipart", True, False, known)
            return
        d.compare(where, "subtype", rest[0].lower(), message.get_content_subtype().encode())
        value = field(message, "content-type") or b""
        d.compare(where, "parameters", our_parameters(rest[1]), parameters(value))
        compare_extension(d, where, rest[2:], message)
        children = message.get_payload()
        unclosed |= any(isinstance(defect, email.errors.CloseBoundaryNotFoundDefect) for defect in message.defects)
        if d.compare(where, "number of parts", len(parts), len(children)):
            for number, (part, child) in enumerate(zip(parts, children), 1):
                compare_body(d, f"{where}.{number}", part, child, unclosed)
        return
    if message.get_content_maintype() == "multipart":
        d.compare(where, "multipart", False, True, "email keeps a multipart without parts")
        return
    # What follows a type without a semicolon is none of it.
    kind = message.get_content_type().split()[0].encode()
    if not d.compare(where, "type", ours[0].lower() + b"/" + ours[1].lower(), kind):
        return
    value = field(message, "content-type")
    expected = parameters(value) if value and b"/" in value else []
    if kind == b"text/plain" and not (value and re.match(rb"\s*[^\s;()<>@,:\\\"/\[\]?=]+\s*/\s*[^\s;()<>@,:\\\"/\[\]?=]+", value)):
        expected = [(b"charset", b"us-ascii")]  # RFC 2045, 5.2
    d.compare(where, "parameters", our_parameters(ours[2]), expected)
    d.compare(where, "id", plain(ours[3]), field(message, "content-id"))
    d.compare(where, "description", plain(ours[4]), field(message, "content-description"))
    encoding = re.match(rb"[^\s;()]*", field(message, "content-transfer-encoding") or b"").group()
    d.compare(where, "encoding", ours[5].lower(), encoding.lower() or b"7bit")
    payload = message._payload  # get_payload() decodes 8-bit text
    if isinstance(payload, list) and kind != b"message/rfc822":
        return  # message/delivery-status and the like: email looks into them, RFC 3501 does not
    if isinstance(payload, list):
        text = flattened(payload[0])
        same = "email flattens a message within differently"
        d.compare(where, "octets", int(ours[6]), len(text), same)
        d.compare(where, "lines", int(ours[9]), text.count(b"\n"), same)
        compare_envelope(d, where + " message", ours[7], payload[0])
        compare_body(d, where + ".", ours[8], payload[0])
        rest = ours[10:]
    else:
        text = octets(payload)
        cut = unclosed and int(ours[6]) == len(text) + 2
        known = "email shortens a part without its end" if cut else None
        d.compare(where, "octets", int(ours[6]), len(text), known)
        if kind.startswith(b"text/"):
            d.compare(where, "lines", int(ours[7]), text.count(b"\n"), known)
            rest = ours[8:]
        else:
            rest = ours[7:]
    d.compare(where, "md5", plain(rest[0]), field(message, "content-md5"))
    compare_extension(d, where, rest[1:], message)


def messages(imap):
    """Each message as its number, its octets, and the data of its ENVELOPE and BODYSTRUCTURE."""
    count = int(imap.response("EXISTS")[1][0])
    for first in range(1, count + 1, 50):
        last = min(first + 49, count)
        for number in range(first, last + 1):
            _, whole = imap.fetch(str(number), "(BODY.PEEK[])")
            _, data = imap.fetch(str(number), "(ENVELOPE BODYSTRUCTURE)")
            stream = tokens(data)
            next(stream)  # the number
            items = parse(stream)
            items = dict(zip(items[::2], items[1::2]))
            yield number, whole[0][1], items["ENVELOPE"], items["BODYSTRUCTURE"]


def main():
    port, user, password, mailbox = sys.argv[1:]
    imap = imaplib.IMAP4("127.0.0.1", int(port))
    imap.login(user, password)
    imap.select(mailbox, readonly=True)
    d = Differences()
    count = 0
    for number, whole, envelope, structure in messages(imap):
        message = email.message_from_bytes(whole)
        count += 1
        where = f"{number} {(field(message, 'message-id') or b'').decode('latin-1')}"
        defects = [type(defect).__name__ for part in message.walk() for defect in part.defects]
        if any(name in ("MissingHeaderBodySeparatorDefect", "FirstHeaderLineIsContinuationDefect") for name in defects):
            d.known["email reads on after a header line that is none"] += 1
            continue
        compare_envelope(d, where, envelope, message)
        compare_body(d, where, structure, message)
    imap.logout()
    print(f"{count} messages, {d.compared} values compared")
    for reason, times in sorted(d.known.items()):
        print(f"  {times} x {reason}: {KNOWN[reason]}")
    for line in d.wrong[:50]:
        print(f"  {line}")
    if d.wrong:
        sys.exit(f"{len(d.wrong)} values differ")
    # The differences that are known explain little, or they explain nothing.
    if sum(d.known.values()) * 100 > d.compared:
        sys.exit("more than a hundredth of all values differs in known ways")


if __name__ == "__main__":
    main()
