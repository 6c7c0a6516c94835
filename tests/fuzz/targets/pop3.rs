//! POP3 without a socket: replies are the same however the input was cut on its way, and nothing is deleted without QUIT.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use posthaste_pop3::{Code, Config, Event, Maildrop, Message, Refusal, Security, Session};

const BODY: &[u8] = b".\r\n..x\r\nline\n.\r\nlast";

fn take(security: Security, pieces: &[&[u8]]) -> (Vec<u8>, usize) {
    let (mut output, mut input, mut updates) = (Vec::new(), Vec::new(), 0);
    let mut session = Session::new(Arc::new(Config::new("store.example")), security, &mut output);
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            let (taken, event) = session.step(&input, &mut output);
            input.drain(..taken);
            match event {
                Event::NeedInput => break,
                Event::Flush => {}
                Event::LogIn(credentials) => {
                    if format!("{credentials:?}").contains("wrong") {
                        session.refuse(&Refusal { code: Some(Code::Auth), text: "No" }, &mut output);
                        continue;
                    }
                    let mut maildrop = Maildrop::default();
                    (1..=5).for_each(|uid| maildrop.push(Message { uid, octets: BODY.len() as u64 + 2 }));
                    session.open(maildrop.complete(7), &mut output);
                }
                // Whatever came with it is forgotten, so that how it was cut would matter.
                Event::StartTls => return (output, updates),
                Event::Retrieve(_) => {
                    session.begin_message(&mut output);
                    session.write_header(b"A: b\r\n\r\n", &mut output);
                    for piece in BODY.chunks(3) {
                        session.write_body(piece, &mut output);
                    }
                    session.end_message(&mut output);
                }
                Event::Update(update) => {
                    assert!(update.deleted.iter().all(|uid| (1..=5).contains(&uid)));
                    updates += 1;
                    session.updated(Ok(()), &mut output);
                }
                Event::AnswerOwed => panic!("every event is answered"),
                Event::Close => return (output, updates),
            }
        }
    }
    assert_eq!(updates, 0, "an update without the end of the session");
    (output, updates)
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    let security = || Security { passwords: choice & 1 == 0, starttls: choice & 2 == 0 };
    let (first, second) = data.split_at(usize::from(choice >> 2) * data.len() / 64);
    let whole = take(security(), &[data]);
    assert_eq!(take(security(), &[first, second]), whole);
    let quits = data.split(|&b| b == b'\n').any(|line| line.trim_ascii().eq_ignore_ascii_case(b"quit"));
    assert!(whole.1 == 0 || quits);
});
