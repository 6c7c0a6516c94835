//! Trace header fields (RFC 5321, 4.4): made from names and a time that the caller gives.
//!
//! Every name is checked against its grammar, and left out or replaced when it does not fit: a newline or a
//! parenthesis from a client must not become header text of ours.

use std::net::IpAddr;

use crate::address::{Mailbox, check_address_literal, check_domain, is_dot_string};
use crate::date::write_date_time;

/// What the client spoke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spoken {
    /// It said HELO.
    Smtp,
    /// It said EHLO.
    Esmtp,
    Lmtp,
}

/// The protocol of the WITH clause (RFC 3848; RFC 6531, 4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct With {
    pub spoken: Spoken,
    pub smtputf8: bool,
    pub tls: bool,
    pub authenticated: bool,
}

impl With {
    fn name(self) -> &'static str {
        match (self.spoken, self.smtputf8, self.tls, self.authenticated) {
            (Spoken::Smtp, ..) => "SMTP",
            (Spoken::Lmtp, false, false, false) => "LMTP",
            (Spoken::Lmtp, false, false, true) => "LMTPA",
            (Spoken::Lmtp, false, true, false) => "LMTPS",
            (Spoken::Lmtp, false, true, true) => "LMTPSA",
            (Spoken::Lmtp, true, false, false) => "UTF8LMTP",
            (Spoken::Lmtp, true, false, true) => "UTF8LMTPA",
            (Spoken::Lmtp, true, true, false) => "UTF8LMTPS",
            (Spoken::Lmtp, true, true, true) => "UTF8LMTPSA",
            (Spoken::Esmtp, false, false, false) => "ESMTP",
            (Spoken::Esmtp, false, false, true) => "ESMTPA",
            (Spoken::Esmtp, false, true, false) => "ESMTPS",
            (Spoken::Esmtp, false, true, true) => "ESMTPSA",
            (Spoken::Esmtp, true, false, false) => "UTF8SMTP",
            (Spoken::Esmtp, true, false, true) => "UTF8SMTPA",
            (Spoken::Esmtp, true, true, false) => "UTF8SMTPS",
            (Spoken::Esmtp, true, true, true) => "UTF8SMTPSA",
        }
    }
}

/// What a Received field says.
#[derive(Debug, Clone, Copy)]
pub struct Received<'a> {
    /// The name in the client's HELO, EHLO or LHLO.
    pub from: &'a str,
    /// The client's address; `None` on a Unix socket.
    pub peer: Option<IpAddr>,
    /// Our host name.
    pub by: &'a str,
    pub with: With,
    /// An atom by which logs name this transaction.
    pub id: &'a str,
    /// Only where there is one recipient, or several would learn of each other (RFC 5321, 7.2).
    pub recipient: Option<&'a Mailbox>,
    pub unix_seconds: i64,
    pub offset_minutes: i16,
}

/// Appends `Return-path-line = "Return-Path:" FWS Reverse-path <CRLF>`.
pub fn write_return_path(out: &mut Vec<u8>, sender: Option<&Mailbox>) {
    out.extend_from_slice(b"Return-Path: <");
    if let Some(sender) = sender {
        write_mailbox(out, sender);
    }
    out.extend_from_slice(b">\r\n");
}

/// Appends `Time-stamp-line = "Received:" FWS Stamp <CRLF>`, folded so that lines stay short.
pub fn write_received(out: &mut Vec<u8>, received: &Received<'_>) {
    out.extend_from_slice(b"Received: from ");
    write_domain(out, received.from, received.with.smtputf8);
    match received.peer {
        Some(IpAddr::V4(address)) => push(out, &[" ([", &address.to_string(), "])"]),
        Some(IpAddr::V6(address)) => match address.to_ipv4_mapped() {
            Some(mapped) => push(out, &[" ([", &mapped.to_string(), "])"]),
            None => push(out, &[" ([IPv6:", &address.to_string(), "])"]),
        },
        None => {}
    }
    out.extend_from_slice(b"\r\n\tby ");
    write_domain(out, received.by, received.with.smtputf8);
    push(out, &[" with ", received.with.name()]);
    if is_dot_string(received.id) && received.id.is_ascii() {
        push(out, &[" id ", received.id]);
    }
    if let Some(recipient) = received.recipient {
        out.extend_from_slice(b"\r\n\tfor <");
        write_mailbox(out, recipient);
        out.push(b'>');
    }
    out.extend_from_slice(b";\r\n\t");
    write_date_time(out, received.unix_seconds, received.offset_minutes);
    out.extend_from_slice(b"\r\n");
}

fn push(out: &mut Vec<u8>, pieces: &[&str]) {
    for piece in pieces {
        out.extend_from_slice(piece.as_bytes());
    }
}

/// A mailbox holds no control characters, by construction.
fn write_mailbox(out: &mut Vec<u8>, mailbox: &Mailbox) {
    use std::io::Write;
    // Writing to a Vec cannot fail.
    let _ = write!(out, "{mailbox}");
}

/// A name that is neither a domain nor an address literal is not repeated.
fn write_domain(out: &mut Vec<u8>, name: &str, smtputf8: bool) {
    let literal = name.strip_prefix('[').and_then(|n| n.strip_suffix(']'));
    let ok = match literal {
        Some(inner) => check_address_literal(inner).is_ok(),
        None => check_domain(name).is_ok() && (smtputf8 || name.is_ascii()),
    };
    push(out, &[if ok { name } else { "unknown" }]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn received() -> Received<'static> {
        Received {
            from: "mx.example",
            peer: Some("192.0.2.1".parse().unwrap()),
            by: "store.example",
            with: With { spoken: Spoken::Lmtp, smtputf8: false, tls: false, authenticated: false },
            id: "1a2b",
            recipient: None,
            unix_seconds: 1_700_000_000,
            offset_minutes: 60,
        }
    }

    fn written(received: &Received<'_>) -> String {
        let mut out = Vec::new();
        write_received(&mut out, received);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn received_line() {
        assert_eq!(
            written(&received()),
            "Received: from mx.example ([192.0.2.1])\r\n\tby store.example with LMTP id 1a2b;\r\n\t\
             Tue, 14 Nov 2023 23:13:20 +0100\r\n"
        );
        let mailbox = Mailbox::parse("a@b.example").unwrap();
        let line = written(&Received {
            peer: Some("2001:db8::1".parse().unwrap()),
            recipient: Some(&mailbox),
            with: With { smtputf8: true, tls: true, ..received().with },
            ..received()
        });
        assert!(line.contains("([IPv6:2001:db8::1])"), "{line}");
        assert!(line.contains(" with UTF8LMTPS id 1a2b\r\n\tfor <a@b.example>;\r\n"), "{line}");
    }

    #[test]
    fn return_path() {
        let mut out = Vec::new();
        write_return_path(&mut out, None);
        write_return_path(&mut out, Some(&Mailbox::parse("\"a b\"@c").unwrap()));
        assert_eq!(out, b"Return-Path: <>\r\nReturn-Path: <\"a b\"@c>\r\n");
    }

    /// Trap 42: nothing a client can send starts a header line or a comment of its own.
    #[test]
    fn trap_42_names_are_checked() {
        for name in ["a\r\nX-Evil: 1", "a (comment", "", "a b", "[1.2.3.4", "[x\r\n]", "é.example"] {
            let line = written(&Received { from: name, by: name, id: name, ..received() });
            assert!(line.starts_with("Received: from unknown ([192.0.2.1])\r\n\tby unknown with LMTP;"), "{line}");
        }
    }

    proptest! {
        #[test]
        fn always_three_lines(from in "\\PC{0,20}|[\\x00-\\x7f]{0,20}", id in "[\\x00-\\x7f]{0,9}") {
            let line = written(&Received { from: &from, id: &id, ..received() });
            prop_assert_eq!(line.matches("\r\n").count(), 3);
            prop_assert_eq!(line.bytes().filter(|b| *b < b' ').count(), 3 * 2 + 2);
        }
    }
}
