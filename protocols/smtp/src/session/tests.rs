use super::*;
use proptest::prelude::*;

fn config() -> Arc<Config> {
    Arc::new(Config { message_bytes_max: 1000, recipients_max: 3, errors_max: 4, ..Config::lmtp("store.example") })
}

/// All output, and a line for each event. Users whose name begins with `no` do not exist; `busy` data is refused.
fn drive(config: &Arc<Config>, chunks: &[&[u8]]) -> (String, Vec<String>) {
    let mut output = Vec::new();
    let mut events = Vec::new();
    let mut session = Session::<u32>::new(config.clone(), &mut output);
    output.clear();
    let mut input = Vec::new();
    'chunks: for chunk in chunks {
        input.extend_from_slice(chunk);
        loop {
            let (taken, event) = session.step(&input, &mut output);
            input.drain(..taken);
            match event {
                Event::NeedInput => break,
                Event::Recipient(mailbox) if mailbox.local_part().starts_with("no") => {
                    session.refuse(&Reply::no_such_user(), &mut output);
                }
                Event::Recipient(_) => session.accept_recipient(7, &mut output),
                Event::Data { declared_bytes: Some(666) } => session.refuse(&Reply::busy(), &mut output),
                Event::Data { .. } => session.accept_data(&mut output),
                Event::Message(message) => {
                    let sender = message.sender.as_ref().map_or(String::new(), ToString::to_string);
                    let to: Vec<_> = message.recipients.iter().map(|r| r.mailbox.to_string()).collect();
                    events.push(format!("{sender}>{}:{}", to.join(","), String::from_utf8_lossy(&message.body)));
                    if config.protocol == Protocol::Smtp {
                        session.answer(&Reply::stored(), &mut output);
                        continue;
                    }
                    for recipient in &message.recipients {
                        let full = recipient.mailbox.local_part() == "full";
                        let reply = if full { Reply::over_quota_for_now() } else { Reply::stored() };
                        session.answer_recipient(&reply, &mut output);
                    }
                }
                Event::StartTls => {
                    events.push(format!("TLS, forgets {} octets", input.len()));
                    input.clear();
                    session.tls_begun();
                }
                Event::AnswerOwed => panic!("all were answered"),
                Event::Close => break 'chunks,
            }
        }
        assert!(session.held_bytes() < 20_000);
    }
    (String::from_utf8(output).unwrap(), events)
}

fn codes(output: &str) -> Vec<&str> {
    output.lines().filter(|l| l.as_bytes()[3] == b' ').map(|l| &l[..3]).collect()
}

fn run(input: &str) -> (String, Vec<String>) {
    drive(&config(), &[input.as_bytes()])
}

/// Trap 43: one reply per accepted RCPT after DATA, in order, also for the same recipient twice.
#[test]
fn trap_43_one_reply_per_recipient_in_order() {
    let (output, events) = run("LHLO x\r\nMAIL FROM:<chris@bar.com>\r\nRCPT TO:<pat@foo>\r\nRCPT TO:<nobody@foo>\r\n\
         RCPT TO:<full@foo>\r\nRCPT TO:<pat@foo>\r\nDATA\r\nBlah\r\n..\r\n.\r\nQUIT\r\n");
    assert_eq!(codes(&output), "250 250 250 550 250 250 354 250 452 250 221".split(' ').collect::<Vec<_>>());
    assert_eq!(events, ["chris@bar.com>pat@foo,full@foo,pat@foo:Blah\r\n.\r\n"]);
    assert!(output.contains("\r\n452 4.2.2 "), "{output}");
}

#[test]
fn order_of_commands() {
    let (output, events) = run("MAIL FROM:<a@b>\r\nLHLO x\r\nRCPT TO:<a@b>\r\nDATA\r\nMAIL FROM:<>\r\nDATA\r\n\
         RCPT TO:<a@b>\r\nRSET\r\nMAIL FROM:<>\r\nMAIL FROM:<>\r\nVRFY a\r\nHELP\r\nNOOP\r\n");
    assert_eq!(codes(&output), "503 250 503 503 250 503 250 250 250 503 252 214 250".split(' ').collect::<Vec<_>>());
    assert_eq!(events, [""; 0]);
}

/// RFC 2033, 4.1: an SMTP client must notice that this is not SMTP.
#[test]
fn smtp_greetings_are_refused() {
    assert_eq!(codes(&run("HELO x\r\nEHLO x\r\n").0), ["500", "500"]);
}

fn smtp(input: &str) -> (String, Vec<String>) {
    let config = Config { message_bytes_max: 1000, recipients_max: 3, errors_max: 4, ..Config::smtp("store.example") };
    drive(&Arc::new(config), &[input.as_bytes()])
}

#[test]
fn smtp_answers_once_for_all_recipients() {
    let (output, events) =
        smtp("EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<pat@foo>\r\nRCPT TO:<Postmaster>\r\nDATA\r\nx\r\n.\r\nQUIT\r\n");
    assert_eq!(codes(&output), ["250", "250", "250", "250", "354", "250", "221"]);
    assert_eq!(events, ["a@b>pat@foo,Postmaster:x\r\n"]);
    // RFC 5321, 3.2: who says HELO gets no extensions.
    assert_eq!(smtp("HELO x\r\n").0, "250 store.example\r\n");
    assert_eq!(codes(&smtp("LHLO x\r\n").0), ["500"]);
    assert_eq!(codes(&smtp("MAIL FROM:<a@b>\r\n").0), ["503"]);
    assert_eq!(
        codes(&smtp("EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<nobody@foo>\r\nDATA\r\n").0),
        ["250", "250", "550", "554"]
    );
}

const BEGIN: &str = "LHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<pat@foo>\r\nRCPT TO:<full@foo>\r\n";

/// RFC 3030, 2 and 4.2: chunks hold anything, dots and ends of messages too, and are answered one by one.
#[test]
fn chunks() {
    let (output, events) =
        run(&format!("{BEGIN}BDAT 6\r\n.\r\nx\r\nBDAT 0\r\nBDAT 6\r\nQUIT\r\nBDAT 0 LAST\r\nNOOP\r\n"));
    assert_eq!(codes(&output), "250 250 250 250 250 250 250 250 452 250".split(' ').collect::<Vec<_>>());
    assert_eq!(events, ["a@b>pat@foo,full@foo:.\r\nx\r\nQUIT\r\n"]);
    // All in one, and without the last line end.
    let (output, events) = run(&format!("{BEGIN}BDAT 4 LAST\r\nA: bQUIT\r\n"));
    assert_eq!(codes(&output), "250 250 250 250 250 452 221".split(' ').collect::<Vec<_>>());
    assert_eq!(events, ["a@b>pat@foo,full@foo:A: b"]);
}

/// Trap 44: what ends a message in chunks, and what does not.
#[test]
fn trap_44_chunks_and_other_commands() {
    // RSET in the middle: nothing of it is left.
    let (output, events) = run(&format!("{BEGIN}BDAT 3\r\nabcRSET\r\n{}BDAT 3 LAST\r\nabc", &BEGIN[8..]));
    assert_eq!(codes(&output)[4..], ["250", "250", "250", "250", "250", "250", "452"]);
    assert_eq!(events, ["a@b>pat@foo,full@foo:abc"]);
    // DATA and RCPT do not mix with chunks.
    let (output, events) = run(&format!("{BEGIN}BDAT 3\r\nabcDATA\r\nRCPT TO:<x@y>\r\nBDAT 0 LAST\r\n"));
    assert_eq!(codes(&output)[4..], ["250", "503", "503", "250", "452"]);
    assert_eq!(events, ["a@b>pat@foo,full@foo:abc"]);
    // A chunk that cannot be taken is read all the same, and so are those after it.
    let (output, events) = run(
        "BDAT 6\r\nNOOP\r\nBDAT 6 LAST\r\nQUIT\r\nLHLO x\r\nMAIL FROM:<a@b>\r\nBDAT 6\r\nQUIT\r\nMAIL FROM:<c@d>\r\n",
    );
    assert_eq!(codes(&output), ["503", "503", "250", "250", "503", "503"]);
    assert_eq!(events, [""; 0]);
    let busy = BEGIN.replace("<a@b>", "<a@b> SIZE=666");
    let (output, _) = run(&format!("{busy}BDAT 6\r\nQUIT\r\nBDAT 6\r\nQUIT\r\nBDAT 6 LAST\r\nQUIT\r\nNOOP\r\n"));
    assert_eq!(codes(&output)[4..], ["452", "452", "452", "452", "250"]);
    // What follows a bad one cannot be read.
    let (output, events) = run(&format!("{BEGIN}BDAT six LAST\r\nQUIT\r\n"));
    assert_eq!((codes(&output)[4..].to_vec(), events.len()), (vec!["421"], 0));
}

/// Trap 41: without BINARYMIME, chunks are lines, too. RFC 1870: and have the same limit.
#[test]
fn trap_41_chunks_are_checked() {
    for (chunks, code) in [
        ("BDAT 2\r\na\rBDAT 2 LAST\r\n\nb", "250"),
        ("BDAT 2\r\na\rBDAT 2 LAST\r\nbc", "550"),
        ("BDAT 2 LAST\r\na\r", "550"),
        ("BDAT 2 LAST\r\na\n", "550"),
        ("BDAT 4\r\na\nb\nBDAT 0 LAST\r\n", "550"),
    ] {
        let (output, events) = run(&format!("{BEGIN}{chunks}"));
        assert!(codes(&output)[4..].contains(&code), "{chunks:?}: {output}");
        assert_eq!(events.len(), usize::from(code == "250"), "{chunks:?}");
    }
    let (output, events) =
        run(&format!("{BEGIN}BDAT 600\r\n{0}BDAT 600\r\n{0}BDAT 0 LAST\r\nNOOP\r\n", "x".repeat(600)));
    assert_eq!(codes(&output)[4..], ["250", "552", "552", "552", "250"]);
    assert_eq!(events.len(), 0);
    let (output, _) = run(&format!("{BEGIN}BDAT 2000000 LAST\r\n{}", "x".repeat(2_000_000)));
    assert_eq!(codes(&output)[4..], ["552", "552"]);
}

/// Trap 1, trap 42: nothing said before TLS counts after it.
#[test]
fn trap_1_starttls_begins_anew() {
    let config = Arc::new(Config { starttls: true, ..Config::smtp("store.example") });
    let input = "EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nSTARTTLS\r\nRCPT TO:<e@f>\r\nDATA\r\n";
    let (output, events) = drive(&config, &[input.as_bytes(), b"MAIL FROM:<g@h>\r\nEHLO x\r\nSTARTTLS\r\nDATA\r\n"]);
    assert_eq!(codes(&output), ["250", "250", "250", "220", "503", "250", "503", "503"]);
    assert_eq!(events, ["TLS, forgets 21 octets"]);
    assert_eq!(output.matches("STARTTLS\r\n").count(), 1, "it is not offered twice: {output}");
    assert_eq!(codes(&smtp("EHLO x\r\nSTARTTLS\r\n").0), ["250", "502"]);
}

/// RFC 2034, 4: in every 2xx, 4xx and 5xx but the greeting and the answer to LHLO.
#[test]
fn enhanced_codes_agree_with_reply_codes() {
    let (output, _) = run("LHLO x\r\nXYZ\r\nMAIL FROM:<a@b> SIZE=1001\r\nMAIL FROM:<a@b>\r\nRCPT TO:<é@b>\r\n\
         RCPT TO:<no@b>\r\nRCPT TO:<a@b>\r\nRCPT TO:<a@b>\r\nRCPT TO:<a@b>\r\nRCPT TO:<a@b>\r\nDATA\r\na\nb\r\n.\r\n\
         EXPN x\r\nVRFY x\r\nHELP\r\nNOOP\r\nQUIT\r\n");
    let (hello, rest) = output.split_once("CHUNKING\r\n").unwrap();
    assert!(hello.starts_with("250-store.example\r\n250-PIPELINING\r\n250-SIZE 1000\r\n"), "{hello}");
    for line in rest.lines().filter(|l| !l.starts_with('3')) {
        assert_eq!(line[4..6], format!("{}.", &line[..1]), "{line}");
    }
    assert_eq!(
        codes(rest),
        "500 552 250 553 550 250 250 250 452 354 550 550 550 502 252 214 250 221".split(' ').collect::<Vec<_>>()
    );
}

#[test]
fn size_limits() {
    let envelope = "LHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<a@b>\r\nDATA\r\n";
    let (output, events) = run(&format!("{envelope}{}\r\n.\r\nNOOP\r\n", "x".repeat(999)));
    assert_eq!(codes(&output)[4..], ["552", "250"]);
    assert_eq!(events.len(), 0);
    let (output, _) = run(&format!("{envelope}{}\r\n.\r\nNOOP\r\n", "x".repeat(998)));
    assert_eq!(codes(&output)[4..], ["250", "250"]);
    let (output, _) = run("LHLO x\r\nMAIL FROM:<a@b> SIZE=666\r\nRCPT TO:<a@b>\r\nDATA\r\nNOOP\r\n");
    assert_eq!(codes(&output)[3..], ["452", "250"], "busy");
}

#[test]
fn abandoned_data_frees_memory_and_keeps_the_connection() {
    let mut output = Vec::new();
    let mut session = Session::<()>::new(config(), &mut output);
    session.step(b"LHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<a@b>\r\n", &mut output);
    session.accept_recipient((), &mut output);
    session.step(b"DATA\r\n", &mut output);
    session.accept_data(&mut output);
    assert!(matches!(session.step(b"abc\r\n", &mut output), (5, Event::NeedInput)));
    assert!(session.held_bytes() >= 5);
    session.abandon_data();
    assert_eq!(session.held_bytes(), 0);
    output.clear();
    assert!(matches!(session.step(b"def\r\n.\r\nNOOP\r\n", &mut output), (14, Event::NeedInput)));
    assert_eq!(codes(std::str::from_utf8(&output).unwrap()), ["452", "250"]);
}

#[test]
fn overlong_line_costs_one_reply() {
    let (output, _) = run(&format!("LHLO x\r\n{}\r\nNOOP\r\n", "A".repeat(100_000)));
    assert_eq!(codes(&output), ["250", "500", "250"]);
    let (output, _) = run("NOOP\nNOOP\r\n");
    assert_eq!(codes(&output), ["500", "250"], "a bare LF ends no command");
}

#[test]
fn too_many_errors_close() {
    let (output, _) = run("A\r\nB\r\nC\r\nD\r\nE\r\nNOOP\r\n");
    assert_eq!(codes(&output), ["500", "500", "500", "500", "500", "421"]);
    assert_eq!(codes(&run("GET / HTTP/1.1\r\nHost: x\r\n").0), ["421"]);
}

#[test]
fn answers_out_of_turn_change_nothing() {
    let mut output = Vec::new();
    let mut session = Session::new(config(), &mut output);
    output.clear();
    session.accept_recipient((), &mut output);
    session.accept_data(&mut output);
    session.refuse(&Reply::busy(), &mut output);
    session.answer_recipient(&Reply::stored(), &mut output);
    assert_eq!(output, b"");
    session.step(b"LHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<a@b>\r\n", &mut output);
    assert!(matches!(session.step(b"NOOP\r\n", &mut output), (0, Event::AnswerOwed)));
}

/// Trap 41: the bytes after a false end are message text, never commands.
#[test]
fn trap_41_nothing_is_smuggled() {
    for end in ["\n.\n", "\n.\r\n", "\r.\r\n", "\r\n.\n", "\r\n.\r"] {
        let (output, events) = run(&format!(
            "LHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nRCPT TO:<e@d>\r\nDATA\r\nx{end}MAIL FROM:<evil@x>\r\n\
             RCPT TO:<victim@d>\r\nDATA\r\nevil\r\n.\r\nNOOP\r\n"
        ));
        assert_eq!(codes(&output), ["250", "250", "250", "250", "354", "550", "550", "250"], "{end:?}");
        assert_eq!(events.len(), 0);
    }
}

const TRANSCRIPT: &str = "LHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nRCPT TO:<no@d>\r\nRCPT TO:<full@d>\r\nDATA\r\n\
    one\r\n..two\r\n\r\n.\r\nMAIL FROM:<>\r\nBOGUS\r\nRCPT TO:<c@d>\r\nDATA\r\nx\ry\r\n.\r\nNOOP\nRSET\r\nQUIT\r\n";

#[test]
fn every_split_gives_the_same() {
    let whole = drive(&config(), &[TRANSCRIPT.as_bytes()]);
    for split in 0..=TRANSCRIPT.len() {
        let (a, b) = TRANSCRIPT.as_bytes().split_at(split);
        assert_eq!(drive(&config(), &[a, b]), whole, "{split}");
    }
    let bytes: Vec<&[u8]> = TRANSCRIPT.as_bytes().chunks(1).collect();
    assert_eq!(drive(&config(), &bytes), whole);
}

proptest! {
    #[test]
    fn random_pieces_never_panic_and_split_anywhere(
        pieces in prop::collection::vec(prop::sample::select(vec![
            "LHLO x\r\n", "MAIL FROM:<a@b>\r\n", "MAIL FROM:<", "RCPT TO:<a@b>\r\n", "RCPT TO:<no@b>\r\n", "DATA\r\n",
            "\r\n.\r\n", "\r\n", "\n", "\r", ".", "RSET\r\n", "text", "QUIT\r\n", "\0", "NOOP\r\n"]), 0..30),
        split in 0usize..200)
    {
        let input = pieces.concat();
        let whole = drive(&config(), &[input.as_bytes()]);
        let (a, b) = input.as_bytes().split_at(split.min(input.len()));
        prop_assert_eq!(drive(&config(), &[a, b]), whole);
    }

    #[test]
    fn random_bytes_never_panic(input in prop::collection::vec(any::<u8>(), 0..600)) {
        drive(&config(), &[&input]);
    }
}
