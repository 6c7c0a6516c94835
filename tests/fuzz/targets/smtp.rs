//! SMTP and LMTP without a socket: replies and messages are the same however the input was cut on its way.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use posthaste_smtp::{
    Config, Event, Mailbox, Protocol, Received, Reply, Session, With, write_received, write_return_path,
};

fn take(protocol: Protocol, pieces: &[&[u8]]) -> (Vec<u8>, Vec<Vec<u8>>) {
    let config = Config {
        message_bytes_max: 5000,
        recipients_max: 5,
        starttls: true,
        ..match protocol {
            Protocol::Lmtp => Config::lmtp("store.example"),
            Protocol::Smtp => Config::smtp("store.example"),
        }
    };
    let (mut output, mut messages, mut input) = (Vec::new(), Vec::new(), Vec::new());
    let mut session = Session::<u8>::new(Arc::new(config), &mut output);
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            let (taken, event) = session.step(&input, &mut output);
            input.drain(..taken);
            match event {
                Event::NeedInput => break,
                Event::Recipient(mailbox) if mailbox.local_part().starts_with("no") => {
                    session.refuse(&Reply::no_such_user(), &mut output);
                }
                Event::Recipient(mailbox) => {
                    assert_eq!(Mailbox::parse(&mailbox.to_string()).ok().as_ref(), Some(&mailbox));
                    session.accept_recipient(1, &mut output);
                }
                Event::Data { declared_bytes: Some(666) } => session.refuse(&Reply::busy(), &mut output),
                Event::Data { .. } => session.accept_data(&mut output),
                Event::Message(message) => {
                    let mut stored = Vec::new();
                    write_return_path(&mut stored, message.sender.as_ref());
                    let received = Received {
                        from: session.hello_name().unwrap_or_default(),
                        peer: None,
                        by: "store.example",
                        with: With { spoken: session.spoken(), smtputf8: false, tls: false, authenticated: false },
                        id: "1",
                        recipient: Some(&message.recipients[0].mailbox),
                        unix_seconds: 0,
                        offset_minutes: 0,
                    };
                    write_received(&mut stored, &received);
                    assert_eq!(stored.iter().filter(|&&b| b == b'\n').count(), 5, "trace fields of five lines");
                    assert!(message.body.len() <= 5000);
                    stored.extend_from_slice(&message.body);
                    messages.push(stored);
                    while session.answer_recipient(&Reply::stored(), &mut output) {}
                }
                // Whatever came with it is forgotten, so that how it was cut would matter.
                Event::StartTls => return (output, messages),
                Event::AnswerOwed => panic!("every event is answered"),
                Event::Close => return (output, messages),
            }
        }
        assert!(session.held_bytes() < 300_000);
    }
    (output, messages)
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    let protocol = if choice & 1 == 0 { Protocol::Lmtp } else { Protocol::Smtp };
    let (first, second) = data.split_at(usize::from(choice >> 1) * data.len() / 128);
    let whole = take(protocol, &[data]);
    assert_eq!(take(protocol, &[first, second]), whole);
    for line in whole.0.split_inclusive(|&b| b == b'\n') {
        assert!(line.ends_with(b"\r\n") && line.len() <= 512 && line[..3].iter().all(u8::is_ascii_digit));
    }
});
