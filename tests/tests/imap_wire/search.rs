//! SEARCH (RFC 3501, 6.4.4).

use crate::wire::Running;

const MESSAGES: [&[u8]; 6] = [
    b"From: =?utf-8?Q?J=C3=BCrgen?= <juergen@example.org>\r\nTo: ann@example.org, Bob <bob@example.net>\r\n\
        Subject: Plain greetings\r\nDate: Wed, 1 Jan 2020 23:30:00 -0800\r\n\r\nHello World\r\n",
    b"From: bob@example.net\r\nCc: undisclosed: carl@example.com;\r\nBcc: secret@example.org\r\n\
        Subject: =?iso-8859-1?B?RnL8aHN0/GNr?= =?iso-8859-1?Q?_um_8?=\r\nDate: 2 Jan 2020 00:10 +0000\r\nX-Label:\r\n\
        Content-Type: text/plain; charset=koi8-r\r\nContent-Transfer-Encoding: base64\r\n\r\n8NLJ18XU\r\n",
    b"Subject: folded\r\n subject\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\npreamble\r\n--b\r\n\
        Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\nna=C3=AFve soft=\r\nbreak\r\n\
        --b\r\nContent-Type: message/rfc822\r\n\r\nSubject: inner\r\n\r\nwithin\r\n--b\r\n\
        Content-Type: application/pdf; name=\"report.pdf\"\r\n\r\nhidden\r\n--b--\r\n",
    b"Subject: Caf\xe9 8bit\r\nDate: yesterday\r\n\r\n\xcf\x80 is pi\r\n",
    b"Content-Type: text/plain; charset=gb2312\r\n\r\n\xd6\xd0\xce\xc4\r\n",
    b"\r\nno header at all\r\n",
];

#[test]
fn texts_are_found_as_people_read_them() {
    let running = Running::new();
    let mut client = running.login();
    for message in MESSAGES {
        assert!(client.append("INBOX", "", message).starts_with("OK "));
    }
    client.ok("SELECT INBOX");
    for (keys, expected) in [
        ("FROM jürgen", &[1][..]),
        ("FROM JÜRGEN", &[1]),
        ("FROM juergen@EXAMPLE", &[1]),
        ("FROM example", &[1, 2]),
        ("FROM utf-8", &[]),
        ("FROM \"\"", &[1, 2]),
        ("TO bob", &[1]),
        ("CC carl", &[2]),
        ("CC undisclosed", &[2]),
        ("BCC secret", &[2]),
        ("SUBJECT \"frühstück um\"", &[2]),
        ("SUBJECT \"folded subject\"", &[3]),
        ("SUBJECT café", &[4]),
        ("SUBJECT inner", &[]),
        ("HEADER X-Label \"\"", &[2]),
        ("HEADER x-label x", &[]),
        ("HEADER X-None \"\"", &[]),
        ("NOT HEADER Subject \"\"", &[5, 6]),
        ("HEADER Content-Type multipart", &[3]),
        ("BODY \"hello w\"", &[1]),
        ("BODY ПРИВЕТ", &[2]),
        ("BODY naïve", &[3]),
        ("BODY softbreak", &[3]),
        ("BODY within", &[3]),
        ("BODY inner", &[3]),
        ("BODY hidden", &[]),
        ("BODY preamble", &[]),
        ("BODY folded", &[]),
        ("BODY Π", &[4]),
        ("BODY 中文", &[5]),
        ("BODY \"\"", &[1, 2, 3, 4, 5, 6]),
        ("TEXT folded", &[3]),
        ("TEXT report.pdf", &[3]),
        ("TEXT header", &[6]),
        ("TEXT frühstück", &[2]),
        ("TEXT nowhere", &[]),
        ("NOT TEXT hello", &[2, 3, 4, 5, 6]),
        ("OR (BODY hello FROM \"jürgen\") (NOT SUBJECT \"\" 6)", &[1, 6]),
        ("OR OR BODY hello BODY привет SUBJECT folded", &[1, 2, 3]),
        ("NOT (OR BODY hello NOT 1:2)", &[2]),
        ("2:3 NOT UID 3 TEXT bob", &[2]),
        ("LARGER 1 SMALLER 40 TEXT header", &[6]),
        // By the day of the Date field, whatever its zone.
        ("SENTON 1-Jan-2020", &[1]),
        ("SENTON 2-Jan-2020", &[2]),
        ("SENTBEFORE 2-Jan-2020", &[1]),
        ("SENTSINCE 2-Jan-2020", &[2]),
        ("NOT SENTSINCE 1-Jan-1970", &[3, 4, 5, 6]),
        ("SENTSINCE 1-Jan-2019 BODY hello", &[1]),
        ("CHARSET UTF-8 BODY naïve", &[3]),
        ("CHARSET US-ASCII BODY hello", &[1]),
    ] {
        // What is not ASCII goes in a literal, as it must; many clients send it in quotes.
        let with = |write: fn(&str) -> String| {
            let words = keys.split(' ').map(|word| match word.is_ascii() || keys.contains('"') {
                true => word.to_owned(),
                false => write(word),
            });
            words.collect::<Vec<_>>().join(" ")
        };
        assert_eq!(client.search(with(|word| format!("{{{}+}}\r\n{word}", word.len()))), expected, "{keys}");
        assert_eq!(client.search(with(|word| format!("\"{word}\""))), expected, "{keys}");
    }
    // Charsets of the client's choice (RFC 3501, 6.4.4).
    assert_eq!(client.search(b"CHARSET ISO-8859-1 BODY {5+}\r\nna\xefve"), [3]);
    assert_eq!(client.search(b"CHARSET koi8-r TEXT {6+}\r\n\xd0\xd2\xc9\xd7\xc5\xd4"), [2]);
    for unknown in ["X-NONE", "utf-16", "\"\""] {
        let answer = client.answer(format!("SEARCH CHARSET {unknown} ALL"));
        let known = unknown == "\"\"";
        assert_eq!(answer.starts_with("NO [BADCHARSET (US-ASCII UTF-8)] "), !known, "{unknown}: {answer}");
    }
    for bad in [
        "SENTON 31-Feb-2020",
        "BEFORE 30-Feb-2024",
        "SINCE 29-Feb-2023",
        "ON 0-Jan-2020",
        "TEXT",
        "HEADER x",
        "BODY {2+}\r\n\u{0}a",
    ] {
        assert!(client.answer(format!("SEARCH {bad}")).starts_with("BAD "), "{bad}");
    }
    // The search has not touched the messages (RFC 3501, 6.4.4).
    assert_eq!(client.search("SEEN"), [0_u32; 0]);
    // UIDs, in both forms of the answer, and sequence numbers that expunges have moved.
    client.ok("STORE 1 +FLAGS.SILENT (\\Deleted)");
    client.ok("EXPUNGE");
    assert_eq!(client.search("TEXT bob"), [1]);
    assert_eq!(client.ok("UID SEARCH TEXT bob"), ["* SEARCH 2"]);
    running.stop();
}

/// Trap 5 and the project's own: one search over large and many messages does not keep others waiting, and uses no more
/// memory than a delivery.
#[test]
fn large_messages_are_searched_in_steps() {
    let running = Running::new();
    let mut client = running.login();
    let line = "The quick brown fox jumps over the lazy dog. ".repeat(2) + "\r\n";
    let body = line.repeat(100_000);
    let whole = format!("Subject: large\r\n\r\n{body}needle at the end\r\n");
    assert!(client.append("INBOX", "", &whole).starts_with("OK "));
    let parts: String = (0..2000).map(|number| format!("--b\r\nX-Part: {number}\r\n\r\npart {number} \r\n")).collect();
    let many = format!("Content-Type: multipart/mixed; boundary=b\r\n\r\n{parts}--b--\r\n");
    assert!(client.append("INBOX", "", &many).starts_with("OK "));
    client.ok("SELECT INBOX");
    assert_eq!(client.search("BODY \"needle at\""), [1]);
    assert_eq!(
        client.search("BODY \"dog. \r\nThe\"".replace("\"dog. \r\nThe\"", "{10+}\r\ndog. \r\nThe")),
        [1],
        "across steps and lines"
    );
    assert_eq!(client.search("BODY \"part 1999 \""), [2]);
    assert_eq!(client.search("TEXT \"x-part: 1234\""), [2]);
    assert_eq!(client.search("BODY absent"), [0_u32; 0]);
    // A second session is served while the first one's search runs.
    let mut other = running.select("INBOX");
    let searches: String = (0..20).map(|number| format!("s{number} SEARCH BODY absent\r\n")).collect();
    client.send(searches);
    let start = std::time::Instant::now();
    let mut longest = std::time::Duration::ZERO;
    for _ in 0..50 {
        let begun = start.elapsed();
        other.ok("NOOP");
        longest = longest.max(start.elapsed() - begun);
    }
    client.until("s19");
    // A debug build decodes slowly; what matters is that nobody waits for a whole search.
    println!("the longest wait beside 20 searches of {} octets: {longest:?}", whole.len() + many.len());
    assert!(longest < std::time::Duration::from_secs(2), "{longest:?}");
    running.stop();
}

#[test]
fn too_much_is_refused() {
    let running = Running::new();
    let mut client = running.select("INBOX");
    let keys = " ALL".repeat(1000);
    assert!(client.answer(format!("SEARCH ALL{keys}")).starts_with("NO [LIMIT] "));
    assert_eq!(client.answer(format!("SEARCH {}ALL", "NOT ".repeat(3000))), "BAD Search keys nested too deeply");
    let nested = format!("{}ALL{}", "(".repeat(3000), ")".repeat(3000));
    assert_eq!(client.answer(format!("SEARCH {nested}")), "BAD Search keys nested too deeply");
    client.fill("INBOX", 2);
    assert_eq!(client.search("ALL"), [1, 2]);
    running.stop();
}
