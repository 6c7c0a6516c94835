use super::*;
use proptest::prelude::*;

fn limits() -> Limits {
    Limits {
        line_bytes_max: 100,
        literals_max: 3,
        literal_bytes_max: 20,
        append_bytes_max: 1000,
        command_bytes_max: 1500,
        ask_above_bytes: 500,
        drop_bytes_max: 5000,
        literal_minus: false,
    }
}

fn text(event: &Event) -> String {
    match event {
        Event::Command(frame) => {
            let literals = frame
                .literals
                .iter()
                .map(|l| format!("<{}>", String::from_utf8_lossy(&l.bytes.clone().into_vec()).into_owned()));
            format!("{}{}", String::from_utf8_lossy(&frame.text).replace("\r\n", "~"), literals.collect::<String>())
        }
        Event::Refused(refusal) | Event::Fatal(refusal) => {
            let mut out = Vec::new();
            refusal.write(&mut out);
            String::from_utf8_lossy(&out).trim_end().to_owned()
        }
        other => panic!("{other:?}"),
    }
}

fn drive(limits: Limits, chunks: &[&[u8]]) -> (Vec<String>, String) {
    let mut framer = Framer::new(limits);
    let (mut events, mut output, mut input) = (Vec::new(), Vec::new(), Vec::new());
    for chunk in chunks {
        input.extend_from_slice(chunk);
        loop {
            let (taken, event) = framer.step(&input, Expect::Command, &mut output);
            input.drain(..taken);
            match event {
                Event::NeedInput => break,
                Event::Literal { command_bytes: 666 } => events.push(text(&framer.refuse_literal(None, "no"))),
                Event::Literal { .. } => framer.accept_literal(&mut output),
                Event::AnswerOwed => panic!("answered"),
                event => events.push(text(&event)),
            }
        }
        assert!(framer.held_bytes() < 4000, "{}", framer.held_bytes());
    }
    (events, String::from_utf8(output).unwrap())
}

fn run(input: &str) -> Vec<String> {
    drive(limits(), &[input.as_bytes()]).0
}

#[test]
fn lines_and_literals() {
    assert_eq!(run("a NOOP\r\nb NOOP\r\nc NO"), ["a NOOP", "b NOOP"]);
    // RFC 7888, 3
    assert_eq!(
        run("A001 LOGIN {11+}\r\nFRED FOOBAR {7+}\r\nfat man\r\n"),
        ["A001 LOGIN {11+}~ {7+}~<FRED FOOBAR><fat man>"]
    );
    assert_eq!(run("a X {0}\r\n\r\n"), ["a X {0}~<>"]);
    assert_eq!(run("a X ~{2+}\r\n\0\n\r\n"), ["a X ~{2+}~<\0\n>"]);
    assert_eq!(run("a X {}\r\na {+}\r\na {x}\r\na 5}\r\n"), ["a X {}", "a {+}", "a {x}", "a 5}"]);
}

#[test]
fn continuations_only_for_synchronizing_literals() {
    let (events, output) = drive(limits(), &[b"a X {3}\r\nabc {2+}\r\nde {1}\r\nf\r\n"]);
    assert_eq!(events, ["a X {3}~ {2+}~ {1}~<abc><de><f>"]);
    assert_eq!(output, "+ Ready for literal data\r\n".repeat(2));
}

/// Traps 5 and 16: caps on the line, the count of literals, and their size; one answer each, and life goes on.
#[test]
fn trap_5_and_16_caps() {
    let long = "x".repeat(5000);
    assert_eq!(run(&format!("a {long}\r\nb NOOP\r\n")), ["a BAD Command line too long", "b NOOP"]);
    assert_eq!(run(&format!("{long}\r\nb NOOP\r\n")), ["* BAD Command line too long", "b NOOP"]);
    assert_eq!(
        run(&format!("a {long}{{3+}}\r\nabc{{2}}\r\nb NOOP\r\n")),
        ["a BAD Command line too long", "b NOOP"],
        "the literal of a dropped line is no command"
    );
    assert_eq!(run("a X {21}\r\nb NOOP\r\n"), ["a BAD Literal too large", "b NOOP"]);
    assert_eq!(
        run(&format!("a X {{21+}}\r\n{} {{1+}}\r\n\n y\r\nb NOOP\r\n", "\n".repeat(21))),
        ["a BAD Literal too large", "b NOOP"]
    );
    assert_eq!(
        run("a X {1+}\r\na{1+}\r\nb{1+}\r\nc{1+}\r\nd e\r\nb NOOP\r\n"),
        ["a BAD Too many literals in one command", "b NOOP"]
    );
    assert_eq!(run("a X {9999+}\r\nb NOOP\r\n"), ["* BYE [TOOBIG] Literal too large"]);
    assert_eq!(run("a X {99999999999999999999999+}\r\n"), ["* BYE [TOOBIG] Literal too large"]);
    let before_login = Limits::not_authenticated();
    assert_eq!(
        drive(before_login, &[b"a APPEND x {1}\r\nb NOOP\r\n"]).0,
        ["a NO [TOOBIG] Literal too large", "b NOOP"]
    );
}

#[test]
fn append_has_its_own_limits() {
    assert_eq!(run(&format!("a append x {{600+}}\r\n{}\r\n", "y".repeat(600))).len(), 1);
    assert_eq!(run("a APPEND x {1001}\r\nb NOOP\r\n"), ["a NO [TOOBIG] Literal too large", "b NOOP"]);
    assert_eq!(run("a APPEND x {666}\r\nb NOOP\r\n"), ["a NO no", "b NOOP"]);
    assert_eq!(run(&format!("a APPEND x {{666+}}\r\n{}\r\nb NOOP\r\n", "y".repeat(666))), ["a NO no", "b NOOP"]);
    let two = format!("a APPEND x {{900+}}\r\n{} {{900+}}\r\n{}\r\n", "y".repeat(900), "y".repeat(900));
    assert_eq!(run(&two), ["a NO [TOOBIG] Literal too large"]);
}

#[test]
fn literal_minus() {
    let limits = Limits { literal_minus: true, ..Limits::authenticated(10_000) };
    let input = format!("a APPEND x {{4097+}}\r\n{}\r\nb NOOP\r\n", "y".repeat(4097));
    let expected = ["a BAD [TOOBIG] Non-synchronizing literal over 4096 octets", "b NOOP"];
    let mut framer = Framer::new(limits);
    let (mut at, mut events) = (0, Vec::new());
    while events.len() < 2 {
        let (taken, event) = framer.step(&input.as_bytes()[at..], Expect::Command, &mut Vec::new());
        at += taken;
        events.push(text(&event));
    }
    assert_eq!(events, expected);
}

#[test]
fn bare_lf_and_plain_lines() {
    assert_eq!(run("a NOOP\nb NOOP\r\n"), ["a BAD Line must end with CRLF", "b NOOP"]);
    let mut framer = Framer::new(limits());
    let (_, event) = framer.step(b"{5}\r\n", Expect::Line, &mut Vec::new());
    assert_eq!(text(&event), "{5}");
}

proptest! {
    #[test]
    fn every_split_gives_the_same(
        pieces in prop::collection::vec(prop::sample::select(vec![
            "a NOOP\r\n", "b APPEND x ", "{3}\r\n", "{3+}\r\n", "{21+}\r\n", "{21}\r\n", "~{1+}\r\n", "{6000+}\r\n", "\r\n", "\r",
            "\n", "xyz", " ", "{666+}\r\n", "{1}", "long long long long long long long long long long long long long"]), 0..20))
    {
        let input = pieces.concat();
        let whole = drive(limits(), &[input.as_bytes()]);
        for split in 0..=input.len() {
            let (a, b) = input.as_bytes().split_at(split);
            prop_assert_eq!(drive(limits(), &[a, b]), whole.clone());
        }
    }

    #[test]
    fn random_bytes_never_panic(input in prop::collection::vec(any::<u8>(), 0..400)) {
        drive(limits(), &[&input]);
    }
}

#[test]
fn large_octets_are_held_in_pieces_and_come_back_in_order() {
    for (claimed, chunk) in
        [(0, 1), (1, 1), (65_536, 65_536), (65_537, 40_000), (1_000_000, 65_536), (1_000_000, 999_999)]
    {
        let input: Vec<u8> = (0..claimed).map(|number| (number % 251) as u8).collect();
        let mut octets = Octets::default();
        for piece in input.chunks(chunk) {
            let missing = claimed - octets.len() - piece.len();
            octets.extend(piece, missing as u64);
            // What is claimed and has not come takes one piece at most.
            assert!(octets.held_bytes() <= claimed.min(octets.len() + Octets::PIECE_BYTES), "{}", octets.held_bytes());
        }
        assert_eq!((octets.len(), octets.is_empty()), (claimed, claimed == 0));
        assert!(octets.pieces.iter().all(|piece| piece.capacity() <= Octets::PIECE_BYTES));
        assert_eq!(octets.into_vec(), input);
    }
    assert_eq!(Octets::from(b"abc".to_vec()).into_vec(), b"abc");
}
