//! STORE, COPY, MOVE and their UID forms (RFC 9051, 6.4.6 to 6.4.9; RFC 7162, 3.1.3).

use super::Command;
use super::cursor::{Cursor, Fault, Parse};
use crate::types::{Flag, SequenceSet};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreAction {
    Replace,
    Add,
    Remove,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Store {
    pub uid: bool,
    pub set: SequenceSet,
    /// Messages changed after this mod-sequence are left alone; 0 leaves all alone.
    pub unchanged_since: Option<u64>,
    pub action: StoreAction,
    pub silent: bool,
    pub flags: Vec<Flag>,
}

/// `store = "STORE" SP sequence-set [store-modifiers] SP store-att-flags`,
/// `store-att-flags = (["+" / "-"] "FLAGS" [".SILENT"]) SP (flag-list / (flag *(SP flag)))`
pub(super) fn parse_store(c: &mut Cursor<'_>, uid: bool) -> Parse<Store> {
    c.sp()?;
    let set = c.sequence_set()?;
    c.sp()?;
    let mut unchanged_since = None;
    if c.peek() == Some(b'(') {
        c.list(false, |c| {
            if !c.eat_word(b"UNCHANGEDSINCE") {
                return Err(Fault::bad("Unknown STORE modifier"));
            }
            c.sp()?;
            if unchanged_since.replace(c.number64()?).is_some() {
                return Err(Fault::bad("UNCHANGEDSINCE given twice"));
            }
            Ok(())
        })?;
        c.sp()?;
    }
    let action = if c.eat(b'+') {
        StoreAction::Add
    } else if c.eat(b'-') {
        StoreAction::Remove
    } else {
        StoreAction::Replace
    };
    let item = c.keyword();
    let silent = item.eq_ignore_ascii_case(b"FLAGS.SILENT");
    if !silent && !item.eq_ignore_ascii_case(b"FLAGS") {
        return Err(Fault::bad("FLAGS expected"));
    }
    c.sp()?;
    let flags = if c.peek() == Some(b'(') { c.flag_list()? } else { parse_bare_flags(c)? };
    Ok(Store { uid, set, unchanged_since, action, silent, flags })
}

fn parse_bare_flags(c: &mut Cursor<'_>) -> Parse<Vec<Flag>> {
    let mut flags = Vec::new();
    loop {
        flags.extend(c.flag()?);
        if c.peek().is_none() {
            flags.sort_unstable();
            flags.dedup();
            return Ok(flags);
        }
        c.sp()?;
    }
}

/// `copy = "COPY" SP sequence-set SP mailbox`
pub(super) fn parse_copy(c: &mut Cursor<'_>, uid: bool) -> Parse<Command> {
    c.sp()?;
    let set = c.sequence_set()?;
    Ok(Command::Copy { uid, set, mailbox: c.sp_mailbox()? })
}

/// `move = "MOVE" SP sequence-set SP mailbox` (RFC 6851, 5)
pub(super) fn parse_move(c: &mut Cursor<'_>, uid: bool) -> Parse<Command> {
    c.sp()?;
    let set = c.sequence_set()?;
    Ok(Command::Move { uid, set, mailbox: c.sp_mailbox()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::tests::{mailbox, parse_line};

    fn set(text: &str) -> SequenceSet {
        SequenceSet::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn store() {
        let base = Store {
            uid: false,
            set: set("2:4"),
            unchanged_since: None,
            action: StoreAction::Add,
            silent: false,
            flags: vec![Flag::Deleted],
        };
        assert_eq!(parse_line("STORE 2:4 +FLAGS (\\Deleted)"), Ok(Command::Store(base.clone())));
        assert_eq!(parse_line("store 2:4 +flags \\deleted"), Ok(Command::Store(base.clone())));
        assert_eq!(
            parse_line("UID STORE 2:4 (UNCHANGEDSINCE 12121230045) -FLAGS.SILENT (\\Seen $x)"),
            Ok(Command::Store(Store {
                uid: true,
                unchanged_since: Some(12_121_230_045),
                action: StoreAction::Remove,
                silent: true,
                flags: vec![Flag::Seen, Flag::Keyword("$x".into())],
                ..base.clone()
            }))
        );
        assert_eq!(
            parse_line("STORE 2:4 FLAGS ()"),
            Ok(Command::Store(Store { action: StoreAction::Replace, flags: vec![], ..base }))
        );
    }

    #[test]
    fn refused() {
        for (line, text) in [
            ("STORE 0 FLAGS ()", "Invalid sequence set"),
            ("STORE 1 FLAG ()", "FLAGS expected"),
            ("STORE 1 FLAGS", "Space expected"),
            ("STORE 1 FLAGS ", "Flag expected"),
            ("STORE 1 (FOO 1) FLAGS ()", "Unknown STORE modifier"),
            ("STORE 1 (UNCHANGEDSINCE 1 UNCHANGEDSINCE 2) FLAGS ()", "UNCHANGEDSINCE given twice"),
            ("STORE 1 FLAGS (\\Foo)", "Unknown system flag"),
        ] {
            assert_eq!(parse_line(line), Err(format!("BAD {text}")), "{line}");
        }
    }

    #[test]
    fn copy_and_move() {
        assert_eq!(
            parse_line("UID COPY 1,3 \"a b\""),
            Ok(Command::Copy { uid: true, set: set("1,3"), mailbox: mailbox("a b") })
        );
        assert_eq!(
            parse_line("MOVE $ inbox"),
            Ok(Command::Move { uid: false, set: SequenceSet::Saved, mailbox: mailbox("INBOX") })
        );
        assert!(parse_line("COPY 1").is_err());
    }
}
