//! What has burned other servers, as far as a test of one rule is all there is to it.

use crate::wire::Running;

/// Trap 21: a SEARCH answers with sequence numbers, a UID SEARCH with UIDs, in either form of the answer.
#[test]
fn trap_21_searches_answer_in_the_right_numbers() {
    let running = Running::new();
    let mut client = running.login();
    client.fill("INBOX", 6);
    client.ok("SELECT INBOX");
    client.ok("STORE 1,3 +FLAGS.SILENT (\\Deleted)");
    client.ok("EXPUNGE");
    for (command, answer) in [
        ("SEARCH ALL", "* SEARCH 1 2 3 4"),
        ("UID SEARCH ALL", "* SEARCH 2 4 5 6"),
        ("SEARCH UID 4:*", "* SEARCH 2 3 4"),
        ("UID SEARCH 2:3", "* SEARCH 4 5"),
        ("SEARCH SUBJECT \"number 5\"", "* SEARCH 3"),
        ("UID SEARCH SUBJECT \"number 5\"", "* SEARCH 5"),
        ("SEARCH RETURN (ALL) ALL", "* ESEARCH (TAG \"t\") ALL 1:4"),
        ("UID SEARCH RETURN (MIN MAX ALL COUNT) ALL", "* ESEARCH (TAG \"t\") UID MIN 2 MAX 6 ALL 2,4:6 COUNT 4"),
        ("UID SEARCH RETURN () NOT ALL", "* ESEARCH (TAG \"t\") UID"),
        ("SEARCH RETURN (COUNT) NOT ALL", "* ESEARCH (TAG \"t\") COUNT 0"),
    ] {
        client.send(format!("t {command}\r\n"));
        assert_eq!(client.until("t")[0], answer, "{command}");
    }
    running.stop();
}

/// Trap 28: UIDVALIDITY and UIDs stay over a crash; a new mailbox of an old name has a higher UIDVALIDITY.
#[test]
fn trap_28_uids_are_used_once() {
    let running = Running::new();
    let mut client = running.login();
    client.ok("CREATE Box");
    client.fill("Box", 3);
    client.ok("SELECT Box");
    client.ok("STORE 3 +FLAGS.SILENT (\\Deleted)");
    client.ok("EXPUNGE");
    client.ok("ENABLE CONDSTORE");
    let before = client.ok("STATUS Box (UIDVALIDITY UIDNEXT HIGHESTMODSEQ MESSAGES)");
    assert!(before[0].contains("UIDNEXT 4"), "{before:?}");
    let running = running.restart();
    let mut client = running.login();
    assert_eq!(client.ok("STATUS Box (UIDVALIDITY UIDNEXT HIGHESTMODSEQ MESSAGES)"), before);
    client.ok("DELETE Box");
    client.ok("CREATE Box");
    assert_eq!(client.ok("STATUS Box (UIDVALIDITY UIDNEXT)"), ["* STATUS Box (UIDVALIDITY 3 UIDNEXT 1)"]);
    running.stop();
}

/// Trap 31: a client is told the capabilities again after it has logged in.
#[test]
fn trap_31_capabilities_after_login() {
    let running = Running::new();
    let mut client = running.connect();
    let before = client.ok("CAPABILITY");
    assert!(before[0].contains(" AUTH=PLAIN") && !before[0].contains(" IDLE"), "{before:?}");
    let answer = client.answer("LOGIN ann@example.org secret");
    let told = answer.split(['[', ']']).nth(1).expect("a code").to_owned();
    assert!(told.contains(" IDLE ") && !told.contains("AUTH="), "{answer}");
    assert_eq!(client.ok("CAPABILITY"), [format!("* {told}")]);
    assert!(client.answer("LOGIN ann@example.org secret").starts_with("BAD "));
    running.stop();
}

/// Traps 37, 39 and 40: octets are kept as they came, whatever they look like, and their number is the one that is told.
#[test]
fn trap_40_octets_and_their_number() {
    let running = Running::new();
    let mut client = running.login();
    let messages: [&[u8]; 7] = [
        b"Subject: LF\n\nonly\n",
        b"Subject: mixed\r\n\r\na\nb\rc\r\n\n",
        b"no header",
        b"\r\n",
        b"\n",
        b"\x28\xb5\x2f\xfd\x24\x01\x01\x01\r\n\r\nlooks compressed",
        b"Subject: 8bit \xe9\xff\r\n\r\n\x01\x02\x7f\x80\xff",
    ];
    for message in messages {
        assert!(client.append("INBOX", "", message).starts_with("OK "));
    }
    client.ok("SELECT INBOX");
    for (number, message) in (1..).zip(messages) {
        let said = client.ok(format!("FETCH {number} (RFC822.SIZE BODY.PEEK[])"));
        let text = String::from_utf8_lossy(message);
        let expected = format!("* {number} FETCH (RFC822.SIZE {0} BODY[] {{{0}}}\r\n{text})", message.len());
        assert_eq!(said, [expected]);
    }
    running.stop();
}
