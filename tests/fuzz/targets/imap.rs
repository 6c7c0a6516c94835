//! IMAP without a socket: commands are cut and understood the same however the input was cut on its way, and what a command
//! names can be written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use posthaste_imap::command::{Command, ParseOptions, parse};
use posthaste_imap::frame::{Event, Expect, Framer, Limits};
use posthaste_imap::types::{MailboxName, Pattern};

/// What became of the input: the commands and refusals, and what was said meanwhile.
fn take(limits: Limits, expect: Expect, pieces: &[&[u8]]) -> (Vec<String>, Vec<u8>) {
    let mut framer = Framer::new(limits);
    let (mut events, mut output, mut input) = (Vec::new(), Vec::new(), Vec::new());
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            let (taken, event) = framer.step(&input, expect, &mut output);
            input.drain(..taken);
            match event {
                Event::NeedInput => break,
                Event::Literal { command_bytes } if command_bytes % 3 == 0 => match framer.refuse_literal(None, "not now") {
                    Event::Refused(refusal) => refusal.write(&mut output),
                    Event::Fatal(refusal) => {
                        refusal.write(&mut output);
                        return (events, output);
                    }
                    _ => {}
                },
                Event::Literal { .. } => framer.accept_literal(&mut output),
                Event::Command(frame) => {
                    assert!(frame.text.len() + frame.literals.iter().map(|l| l.bytes.len()).sum::<usize>() < 1 << 20);
                    match parse(frame, ParseOptions::default()) {
                        Ok(tagged) => {
                            again(&tagged.command);
                            events.push(format!("{tagged:?}"));
                        }
                        Err(refusal) => events.push(format!("{refusal:?}")),
                    }
                }
                Event::Refused(refusal) => events.push(format!("{refusal:?}")),
                Event::Fatal(refusal) => {
                    events.push(format!("{refusal:?}"));
                    return (events, output);
                }
                Event::AnswerOwed => panic!("every event is answered"),
            }
        }
        assert!(framer.held_bytes() < 2 << 20);
    }
    (events, output)
}

/// Names survive the way to the client and back, and patterns end.
fn again(command: &Command) {
    let name = |name: &MailboxName| {
        let written = name.to_utf7();
        assert_eq!(&MailboxName::parse(written.as_bytes(), false).expect("what was written"), name);
        Pattern::new("", name.as_str()).matches(&name.as_str().repeat(3), Some('/'));
    };
    match command {
        Command::Create { mailbox, .. }
        | Command::Delete(mailbox)
        | Command::Subscribe(mailbox)
        | Command::Status { mailbox, .. } => name(mailbox),
        Command::Rename { from, to } => {
            name(from);
            name(to);
        }
        _ => {}
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    let limits = || if choice & 1 == 0 { Limits::authenticated(100_000) } else { Limits::not_authenticated() };
    let expect = if choice & 2 == 0 { Expect::Command } else { Expect::Line };
    let at = usize::from(choice >> 2) * data.len() / 64;
    let whole = take(limits(), expect, &[data]);
    let (first, second) = data.split_at(at);
    assert_eq!(take(limits(), expect, &[first, second]), whole);
});
