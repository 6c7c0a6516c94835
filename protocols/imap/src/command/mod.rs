//! Commands: what a [`Frame`] means (RFC 9051, 6; RFC 3501, 6).
//!
//! A command is parsed in one go into owned values, so that it can outlive its buffer and move to the worker that owns
//! the mailbox. What is wrong with it comes back as a [`Refusal`], ready to be sent; nothing here panics, and nothing
//! recurses deeper than a fixed bound.

mod append;
mod auth;
mod cursor;
pub mod fetch;
mod mailbox;
pub mod search;
mod store;

pub use append::{Append, AppendMessage};
pub use auth::Secret;
pub use mailbox::{List, ListReturn, ListSelect, QResync, Select, StatusAttribute};
pub use store::{Store, StoreAction};

pub(crate) use cursor::is_astring_char;

use cursor::{Cursor, Fault, Parse};
use fetch::Fetch;
use search::Search;

use crate::frame::{Frame, tag_of};
use crate::response::Refusal;
use crate::session::State;
use crate::types::{MailboxName, SequenceSet};

/// What changes the meaning of a command.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ParseOptions {
    /// After ENABLE IMAP4rev2 or UTF8=ACCEPT: mailbox names are UTF-8.
    pub utf8: bool,
}

/// A command and the tag that its answer repeats.
#[derive(Debug, PartialEq)]
pub struct Tagged {
    pub tag: String,
    pub command: Command,
}

#[derive(Debug, PartialEq)]
pub enum Command {
    Capability,
    Noop,
    Logout,
    /// Field names and values (RFC 2971).
    Id(Vec<(String, Option<String>)>),
    StartTls,
    /// The mechanism in upper case, and the initial response, decoded (RFC 4959).
    Authenticate {
        mechanism: String,
        initial_response: Option<Vec<u8>>,
    },
    Login {
        user: String,
        password: Secret,
    },
    /// Capability names in upper case.
    Enable(Vec<String>),
    Select(Select),
    Create {
        mailbox: MailboxName,
        special_use: Vec<String>,
    },
    Delete(MailboxName),
    Rename {
        from: MailboxName,
        to: MailboxName,
    },
    Subscribe(MailboxName),
    Unsubscribe(MailboxName),
    List(List),
    /// Reference and pattern in UTF-8.
    Lsub {
        reference: String,
        pattern: String,
    },
    Namespace,
    Status {
        mailbox: MailboxName,
        attributes: Vec<StatusAttribute>,
    },
    Append(Append),
    Idle,
    Check,
    Close,
    Unselect,
    Expunge,
    UidExpunge(SequenceSet),
    Search(Search),
    Fetch(Fetch),
    Store(Store),
    Copy {
        uid: bool,
        set: SequenceSet,
        mailbox: MailboxName,
    },
    Move {
        uid: bool,
        set: SequenceSet,
        mailbox: MailboxName,
    },
}

/// Parses a complete command.
///
/// # Errors
/// The response that the command deserves: BAD where it is not understood, NO where only a name or charset in it is
/// not.
pub fn parse(mut frame: Frame, options: ParseOptions) -> Result<Tagged, Refusal> {
    let tag = tag_of(&frame.text).filter(|tag| frame.text.get(tag.len()) == Some(&b' '));
    let Some(tag) = tag else { return Err(Refusal::bad(None, "Tag and command expected")) };
    let mut cursor = Cursor::new(&frame.text, &mut frame.literals, options);
    cursor.skip(tag.len() + 1);
    match parse_command(&mut cursor).and_then(|command| cursor.end().map(|()| command)) {
        Ok(command) => Ok(Tagged { tag, command }),
        Err(Fault { status, code, text }) => Err(Refusal { tag: Some(tag), status, code, text }),
    }
}

/// `command = tag SP (command-any / command-auth / command-nonauth / command-select) CRLF`
fn parse_command(c: &mut Cursor<'_>) -> Parse<Command> {
    let mut name = [0u8; 16];
    let name = upper(c.atom("Command expected")?, &mut name);
    Ok(match name {
        b"FETCH" => Command::Fetch(fetch::parse(c, false)?),
        b"UID" => return parse_uid(c),
        b"NOOP" => Command::Noop,
        b"IDLE" => Command::Idle,
        b"STORE" => Command::Store(store::parse_store(c, false)?),
        b"SEARCH" => Command::Search(search::parse(c, false)?),
        b"SELECT" => Command::Select(mailbox::parse_select(c, false)?),
        b"EXAMINE" => Command::Select(mailbox::parse_select(c, true)?),
        b"STATUS" => mailbox::parse_status(c)?,
        b"APPEND" => Command::Append(append::parse(c)?),
        b"COPY" => store::parse_copy(c, false)?,
        b"MOVE" => store::parse_move(c, false)?,
        b"EXPUNGE" => Command::Expunge,
        b"CLOSE" => Command::Close,
        b"UNSELECT" => Command::Unselect,
        b"CHECK" => Command::Check,
        b"CAPABILITY" => Command::Capability,
        b"LOGOUT" => Command::Logout,
        b"ID" => auth::parse_id(c)?,
        b"STARTTLS" => Command::StartTls,
        b"AUTHENTICATE" => auth::parse_authenticate(c)?,
        b"LOGIN" => auth::parse_login(c)?,
        b"ENABLE" => auth::parse_enable(c)?,
        b"LIST" => Command::List(mailbox::parse_list(c)?),
        b"LSUB" => mailbox::parse_lsub(c)?,
        b"NAMESPACE" => Command::Namespace,
        b"CREATE" => mailbox::parse_create(c)?,
        b"DELETE" => Command::Delete(c.sp_mailbox()?),
        b"RENAME" => Command::Rename { from: c.sp_mailbox()?, to: c.sp_mailbox()? },
        b"SUBSCRIBE" => Command::Subscribe(c.sp_mailbox()?),
        b"UNSUBSCRIBE" => Command::Unsubscribe(c.sp_mailbox()?),
        _ => return Err(Fault::bad("Unknown command")),
    })
}

/// `uid = "UID" SP (copy / move / fetch / search / store / uid-expunge)`
fn parse_uid(c: &mut Cursor<'_>) -> Parse<Command> {
    c.sp()?;
    let mut name = [0u8; 16];
    let name = upper(c.atom("Command expected after UID")?, &mut name);
    Ok(match name {
        b"FETCH" => Command::Fetch(fetch::parse(c, true)?),
        b"STORE" => Command::Store(store::parse_store(c, true)?),
        b"SEARCH" => Command::Search(search::parse(c, true)?),
        b"COPY" => store::parse_copy(c, true)?,
        b"MOVE" => store::parse_move(c, true)?,
        b"EXPUNGE" => {
            c.sp()?;
            Command::UidExpunge(c.sequence_set()?)
        }
        _ => return Err(Fault::bad("Unknown UID command")),
    })
}

/// The word in upper case; empty where it is too long to be any command.
fn upper<'b>(word: &[u8], buffer: &'b mut [u8; 16]) -> &'b [u8] {
    let Some(out) = buffer.get_mut(..word.len()) else { return b"" };
    out.copy_from_slice(word);
    out.make_ascii_uppercase();
    out
}

impl Command {
    pub fn name(&self) -> &'static str {
        match self {
            Command::Capability => "CAPABILITY",
            Command::Noop => "NOOP",
            Command::Logout => "LOGOUT",
            Command::Id(_) => "ID",
            Command::StartTls => "STARTTLS",
            Command::Authenticate { .. } => "AUTHENTICATE",
            Command::Login { .. } => "LOGIN",
            Command::Enable(_) => "ENABLE",
            Command::Select(select) if select.read_only => "EXAMINE",
            Command::Select(_) => "SELECT",
            Command::Create { .. } => "CREATE",
            Command::Delete(_) => "DELETE",
            Command::Rename { .. } => "RENAME",
            Command::Subscribe(_) => "SUBSCRIBE",
            Command::Unsubscribe(_) => "UNSUBSCRIBE",
            Command::List(_) => "LIST",
            Command::Lsub { .. } => "LSUB",
            Command::Namespace => "NAMESPACE",
            Command::Status { .. } => "STATUS",
            Command::Append(_) => "APPEND",
            Command::Idle => "IDLE",
            Command::Check => "CHECK",
            Command::Close => "CLOSE",
            Command::Unselect => "UNSELECT",
            Command::Expunge => "EXPUNGE",
            Command::UidExpunge(_) => "UID EXPUNGE",
            Command::Search(_) => "SEARCH",
            Command::Fetch(_) => "FETCH",
            Command::Store(_) => "STORE",
            Command::Copy { .. } => "COPY",
            Command::Move { .. } => "MOVE",
        }
    }

    /// Whether the command is legal in a state (RFC 9051, 6.1 to 6.4); if not, the text of the BAD response.
    pub fn check_state(&self, state: State) -> Result<(), &'static str> {
        let needed = match self {
            Command::Capability | Command::Noop | Command::Logout | Command::Id(_) => return Ok(()),
            Command::StartTls | Command::Authenticate { .. } | Command::Login { .. } => {
                let ok = state == State::NotAuthenticated;
                return if ok { Ok(()) } else { Err("Already authenticated") };
            }
            // RFC 5161, 3.1: ENABLE only before a mailbox is selected; RFC 9051, 6.3.1 allows it in both.
            Command::Enable(_)
            | Command::Select(_)
            | Command::Create { .. }
            | Command::Delete(_)
            | Command::Rename { .. }
            | Command::Subscribe(_)
            | Command::Unsubscribe(_)
            | Command::List(_)
            | Command::Lsub { .. }
            | Command::Namespace
            | Command::Status { .. }
            | Command::Append(_)
            | Command::Idle => State::Authenticated,
            Command::Check
            | Command::Close
            | Command::Unselect
            | Command::Expunge
            | Command::UidExpunge(_)
            | Command::Search(_)
            | Command::Fetch(_)
            | Command::Store(_)
            | Command::Copy { .. }
            | Command::Move { .. } => State::Selected,
        };
        match (state, needed) {
            (State::Selected, _) | (State::Authenticated, State::Authenticated) => Ok(()),
            (State::Authenticated, _) => Err("No mailbox selected"),
            (State::NotAuthenticated, _) => Err("Log in first"),
            (State::Logout, _) => Err("Logged out"),
        }
    }

    /// Whether EXPUNGE responses may be sent while the command runs: not where the client speaks in sequence numbers,
    /// which they would shift (RFC 3501, 7.4.1: FETCH, STORE, SEARCH; RFC 9051, 7.5.1).
    pub fn allows_expunge(&self) -> bool {
        match self {
            Command::Fetch(fetch) => fetch.uid,
            Command::Store(store) => store.uid,
            Command::Search(search) => search.uid,
            _ => true,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Parses a line, with literals already inline as `{n+}` CRLF.
    pub(crate) fn parse_line(line: &str) -> Result<Command, String> {
        parse_with(line, ParseOptions::default())
    }

    pub(super) fn parse_with(line: &str, options: ParseOptions) -> Result<Command, String> {
        use crate::frame::{Event, Expect, Framer, Limits};
        let input = format!("t {line}\r\n");
        let (taken, event) =
            Framer::new(Limits::authenticated(100_000)).step(input.as_bytes(), Expect::Command, &mut Vec::new());
        let Event::Command(frame) = event else { panic!("{event:?}") };
        assert_eq!(taken, input.len());
        match parse(frame, options) {
            Ok(tagged) => {
                assert_eq!(tagged.tag, "t");
                Ok(tagged.command)
            }
            Err(refusal) => {
                let mut out = Vec::new();
                refusal.write(&mut out);
                let text = String::from_utf8(out).unwrap();
                Err(text.strip_prefix("t ").unwrap().trim_end().to_owned())
            }
        }
    }

    pub(super) fn mailbox(name: &str) -> MailboxName {
        MailboxName::from_utf8(name)
    }

    #[test]
    fn plain_commands() {
        for (line, command) in [
            ("noop", Command::Noop),
            ("CAPABILITY", Command::Capability),
            ("LOGOUT", Command::Logout),
            ("IDLE", Command::Idle),
            ("CHECK", Command::Check),
            ("CLOSE", Command::Close),
            ("UNSELECT", Command::Unselect),
            ("EXPUNGE", Command::Expunge),
            ("NAMESPACE", Command::Namespace),
            ("STARTTLS", Command::StartTls),
        ] {
            assert_eq!(parse_line(line), Ok(command));
            assert_eq!(parse_line(&format!("{line} ")), Err("BAD Unexpected text after the command".into()));
        }
        assert_eq!(parse_line("XYZZY"), Err("BAD Unknown command".into()));
        assert_eq!(parse_line("AUTHENTICATEAUTHENTICATE"), Err("BAD Unknown command".into()));
        assert_eq!(parse_line(""), Err("BAD Command expected".into()));
        assert_eq!(parse_line("UID EXPUNGE 1:5"), Ok(Command::UidExpunge(SequenceSet::parse(b"1:5").unwrap())));
        assert_eq!(parse_line("UID NOOP"), Err("BAD Unknown UID command".into()));
    }

    #[test]
    fn tags() {
        let refusal = |text: &[u8]| {
            let frame = Frame { text: text.to_vec(), literals: Vec::new() };
            parse(frame, ParseOptions::default()).map(|t| t.tag).map_err(|r| r.tag)
        };
        assert_eq!(refusal(b"a.1] NOOP"), Ok("a.1]".into()));
        for bad in [&b""[..], b"NOOP", b" NOOP", b"+ NOOP", b"a+b NOOP", b"a( NOOP", b"\xff NOOP", b"* OK"] {
            assert_eq!(refusal(bad), Err(None), "{bad:?}");
        }
        assert_eq!(refusal(b"x BOGUS"), Err(Some("x".into())));
    }

    #[test]
    fn states() {
        let check = |line: &str, state| parse_line(line).unwrap().check_state(state);
        assert_eq!(check("NOOP", State::NotAuthenticated), Ok(()));
        assert_eq!(check("LOGIN a b", State::Authenticated), Err("Already authenticated"));
        assert_eq!(check("SELECT a", State::NotAuthenticated), Err("Log in first"));
        assert_eq!(check("SELECT a", State::Selected), Ok(()));
        assert_eq!(check("FETCH 1 UID", State::Authenticated), Err("No mailbox selected"));
        assert_eq!(check("FETCH 1 UID", State::Selected), Ok(()));
    }

    /// Trap 20: no EXPUNGE while the client speaks in sequence numbers.
    #[test]
    fn trap_20_expunge_waits() {
        for (line, allowed) in [
            ("FETCH 1 UID", false),
            ("STORE 1 FLAGS ()", false),
            ("SEARCH ALL", false),
            ("UID FETCH 1 UID", true),
            ("UID SEARCH ALL", true),
            ("NOOP", true),
            ("COPY 1 a", true),
        ] {
            assert_eq!(parse_line(line).unwrap().allows_expunge(), allowed, "{line}");
        }
    }

    /// A figure, not a check: `cargo test --release -p posthaste-imap parse_speed -- --ignored --nocapture`.
    #[test]
    #[ignore = "measures"]
    fn parse_speed() {
        use crate::frame::{Event, Expect, Framer, Limits};
        for line in [
            "a1 NOOP\r\n",
            "a1 UID FETCH 1:* (FLAGS)\r\n",
            "a1 UID FETCH 1:500 (UID FLAGS INTERNALDATE RFC822.SIZE BODY.PEEK[HEADER.FIELDS (DATE FROM SUBJECT)])\r\n",
            "a1 UID STORE 17,19:23 +FLAGS.SILENT (\\Seen \\Deleted)\r\n",
            "a1 UID SEARCH RETURN (ALL) UNDELETED SINCE 1-Jan-2024 OR FROM x SUBJECT y\r\n",
        ] {
            let mut framer = Framer::new(Limits::authenticated(1 << 20));
            let (rounds, mut output) = (200_000, Vec::new());
            let start = std::time::Instant::now();
            for _ in 0..rounds {
                let (_, event) = framer.step(line.as_bytes(), Expect::Command, &mut output);
                let Event::Command(frame) = event else { panic!("{event:?}") };
                std::hint::black_box(parse(frame, ParseOptions::default()).expect("well formed"));
            }
            println!("{:?}: {}", start.elapsed() / rounds, line.trim_end());
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(text in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = parse(Frame { text, literals: Vec::new() }, ParseOptions::default());
        }

        #[test]
        fn word_soup_never_panics(words in prop::collection::vec(prop::sample::select(vec![
            "t", "UID", "FETCH", "STORE", "SEARCH", "LIST", "STATUS", "APPEND", "SELECT", "LOGIN", "ID", "1:*", "(", ")",
            "BODY[", "]", "HEADER.FIELDS", "<0.5>", "FLAGS", "+FLAGS", "\\Seen", "\"a\\\"", "\"", "{3}\r\n", "~{3}\r\n", "NIL", "NOT", "OR",
            "RETURN", "CHARSET", "UTF-8", "MODSEQ", "SINCE", "1-Jan-2024", " ", "INBOX", "&", "$"]), 0..14),
            spaces in any::<u16>())
        {
            let mut text = Vec::new();
            for (i, word) in words.iter().enumerate() {
                text.extend_from_slice(word.as_bytes());
                if spaces >> (i % 16) & 1 == 1 {
                    text.push(b' ');
                }
            }
            let literals = vec![crate::frame::Literal { bytes: b"abc".to_vec().into(), is_literal8: false, has_nul: false }];
            let _ = parse(Frame { text, literals }, ParseOptions::default());
        }
    }
}
