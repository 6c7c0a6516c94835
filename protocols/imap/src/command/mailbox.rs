//! Commands about mailboxes: SELECT, EXAMINE, CREATE, LIST, LSUB, STATUS (RFC 9051, 6.3; RFC 5258; RFC 7162, 3.2.5).

use super::Command;
use super::cursor::{Cursor, Fault, Parse};
use crate::types::{MailboxName, SequenceSet};

#[derive(Debug, Clone, PartialEq)]
pub struct Select {
    pub mailbox: MailboxName,
    /// EXAMINE.
    pub read_only: bool,
    pub condstore: bool,
    pub qresync: Option<QResync>,
}

/// What the client knows of the mailbox (RFC 7162, 3.2.5).
#[derive(Debug, Clone, PartialEq)]
pub struct QResync {
    pub uid_validity: u32,
    pub mod_seq: u64,
    pub known_uids: Option<SequenceSet>,
    /// Sequence numbers and the UIDs that belong to them.
    pub match_data: Option<(SequenceSet, SequenceSet)>,
}

/// `select = "SELECT" SP mailbox [SP "(" select-param *(SP select-param) ")"]`
pub(super) fn parse_select(c: &mut Cursor<'_>, read_only: bool) -> Parse<Select> {
    let mut select = Select { mailbox: c.sp_mailbox()?, read_only, condstore: false, qresync: None };
    if !c.eat_sp_and(b'(') {
        return Ok(select);
    }
    loop {
        let name = c.keyword();
        if name.eq_ignore_ascii_case(b"CONDSTORE") {
            select.condstore = true;
        } else if name.eq_ignore_ascii_case(b"QRESYNC") && select.qresync.is_none() {
            c.sp()?;
            select.qresync = Some(parse_qresync(c)?);
        } else {
            return Err(Fault::bad("Unknown or repeated SELECT parameter"));
        }
        if c.eat(b')') {
            return Ok(select);
        }
        c.expect(b' ', "Space or ) expected")?;
    }
}

/// `"QRESYNC" SP "(" uidvalidity SP mod-sequence-value [SP known-uids] [SP seq-match-data] ")"`
fn parse_qresync(c: &mut Cursor<'_>) -> Parse<QResync> {
    fn fixed_set(c: &mut Cursor<'_>) -> Parse<SequenceSet> {
        let set = c.sequence_set()?;
        if set.is_fixed() { Ok(set) } else { Err(Fault::bad("* is not allowed in known UIDs")) }
    }
    c.expect(b'(', "( expected")?;
    let uid_validity = c.nz_number()?;
    c.sp()?;
    let mod_seq = c.nz_number64()?;
    let (mut known_uids, mut match_data) = (None, None);
    if c.eat(b' ') {
        if c.peek() != Some(b'(') {
            known_uids = Some(fixed_set(c)?);
        }
        if known_uids.is_none() || c.eat(b' ') {
            c.expect(b'(', "( expected")?;
            let numbers = fixed_set(c)?;
            c.sp()?;
            match_data = Some((numbers, fixed_set(c)?));
            c.expect(b')', ") expected")?;
        }
    }
    c.expect(b')', ") expected")?;
    Ok(QResync { uid_validity, mod_seq, known_uids, match_data })
}

/// `create = "CREATE" SP mailbox [SP "(" "USE" SP "(" [use-attr *(SP use-attr)] ")" ")"]` (RFC 6154, 6)
///
/// The special uses are as the client wrote them, without the backslash.
pub(super) fn parse_create(c: &mut Cursor<'_>) -> Parse<Command> {
    let mailbox = c.sp_mailbox()?;
    let mut special_use = Vec::new();
    if c.eat_sp_and(b'(') {
        if !c.eat_word(b"USE") {
            return Err(Fault::bad("Unknown CREATE parameter"));
        }
        c.sp()?;
        c.list(true, |c| {
            c.expect(b'\\', "Special use expected")?;
            special_use.push(c.atom_string("Special use expected")?);
            Ok(())
        })?;
        c.expect(b')', ") expected")?;
    }
    Ok(Command::Create { mailbox, special_use })
}

/// Selection options of LIST (RFC 5258, 3.1; RFC 6154, 5.2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ListSelect {
    pub subscribed: bool,
    pub remote: bool,
    pub recursive_match: bool,
    pub special_use: bool,
}

/// Return options of LIST (RFC 5258, 3.2; RFC 5819; RFC 6154, 5.3).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListReturn {
    pub subscribed: bool,
    pub children: bool,
    pub special_use: bool,
    pub status: Vec<StatusAttribute>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct List {
    /// Any of the extended forms of RFC 5258 was used.
    pub extended: bool,
    pub select: ListSelect,
    pub reference: String,
    /// Never empty. In UTF-8.
    pub patterns: Vec<String>,
    pub returns: ListReturn,
}

/// `list = "LIST" [SP list-select-opts] SP mailbox SP mbox-or-pat [SP list-return-opts]`
pub(super) fn parse_list(c: &mut Cursor<'_>) -> Parse<List> {
    const PATTERNS_MAX: usize = 100;
    let mut list = List {
        extended: false,
        select: ListSelect::default(),
        reference: String::new(),
        patterns: Vec::new(),
        returns: ListReturn::default(),
    };
    c.sp()?;
    if c.peek() == Some(b'(') {
        list.extended = true;
        list.select = parse_list_select(c)?;
        c.sp()?;
    }
    list.reference = c.reference()?;
    c.sp()?;
    if c.peek() == Some(b'(') {
        list.extended = true;
        c.list(false, |c| {
            list.patterns.push(c.list_mailbox()?);
            if list.patterns.len() > PATTERNS_MAX { Err(Fault::bad("Too many patterns")) } else { Ok(()) }
        })?;
    } else {
        list.patterns.push(c.list_mailbox()?);
    }
    if c.eat(b' ') {
        list.extended = true;
        if !c.eat_word(b"RETURN") {
            return Err(Fault::bad("RETURN expected"));
        }
        c.sp()?;
        list.returns = parse_list_return(c)?;
    }
    Ok(list)
}

fn parse_list_select(c: &mut Cursor<'_>) -> Parse<ListSelect> {
    let mut select = ListSelect::default();
    c.list(true, |c| {
        let name = c.keyword();
        let option = [
            (&b"SUBSCRIBED"[..], &mut select.subscribed),
            (b"REMOTE", &mut select.remote),
            (b"RECURSIVEMATCH", &mut select.recursive_match),
            (b"SPECIAL-USE", &mut select.special_use),
        ]
        .into_iter()
        .find(|(option, _)| name.eq_ignore_ascii_case(option));
        let (_, option) = option.ok_or(Fault::bad("Unknown LIST selection option"))?;
        *option = true;
        Ok(())
    })?;
    // A list-select-mod-opt needs a list-select-base-opt.
    if select.recursive_match && !select.subscribed && !select.special_use {
        return Err(Fault::bad("RECURSIVEMATCH needs another selection option"));
    }
    Ok(select)
}

fn parse_list_return(c: &mut Cursor<'_>) -> Parse<ListReturn> {
    let mut returns = ListReturn::default();
    c.list(true, |c| {
        let name = c.keyword();
        if name.eq_ignore_ascii_case(b"SUBSCRIBED") {
            returns.subscribed = true;
        } else if name.eq_ignore_ascii_case(b"CHILDREN") {
            returns.children = true;
        } else if name.eq_ignore_ascii_case(b"SPECIAL-USE") {
            returns.special_use = true;
        } else if name.eq_ignore_ascii_case(b"STATUS") {
            c.sp()?;
            returns.status = parse_status_attributes(c)?;
        } else {
            return Err(Fault::bad("Unknown LIST return option"));
        }
        Ok(())
    })?;
    Ok(returns)
}

/// `lsub = "LSUB" SP mailbox SP list-mailbox`
pub(super) fn parse_lsub(c: &mut Cursor<'_>) -> Parse<Command> {
    c.sp()?;
    let reference = c.reference()?;
    c.sp()?;
    Ok(Command::Lsub { reference, pattern: c.list_mailbox()? })
}

/// `status-att` (RFC 9051, 9; RFC 3501, 9; RFC 7162, 7; RFC 7889, 5; RFC 8474, 7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusAttribute {
    Messages,
    Recent,
    UidNext,
    UidValidity,
    Unseen,
    Deleted,
    Size,
    HighestModSeq,
    AppendLimit,
    MailboxId,
}

/// `status = "STATUS" SP mailbox SP "(" status-att *(SP status-att) ")"`
pub(super) fn parse_status(c: &mut Cursor<'_>) -> Parse<Command> {
    let mailbox = c.sp_mailbox()?;
    c.sp()?;
    Ok(Command::Status { mailbox, attributes: parse_status_attributes(c)? })
}

fn parse_status_attributes(c: &mut Cursor<'_>) -> Parse<Vec<StatusAttribute>> {
    use StatusAttribute as A;
    const NAMES: [(&[u8], StatusAttribute); 10] = [
        (b"MESSAGES", A::Messages),
        (b"RECENT", A::Recent),
        (b"UIDNEXT", A::UidNext),
        (b"UIDVALIDITY", A::UidValidity),
        (b"UNSEEN", A::Unseen),
        (b"DELETED", A::Deleted),
        (b"SIZE", A::Size),
        (b"HIGHESTMODSEQ", A::HighestModSeq),
        (b"APPENDLIMIT", A::AppendLimit),
        (b"MAILBOXID", A::MailboxId),
    ];
    let mut attributes = Vec::new();
    c.list(false, |c| {
        let name = c.keyword();
        let found = NAMES.iter().find(|(n, _)| name.eq_ignore_ascii_case(n));
        let (_, attribute) = found.ok_or(Fault::bad("Unknown STATUS attribute"))?;
        if !attributes.contains(attribute) {
            attributes.push(*attribute);
        }
        Ok(())
    })?;
    Ok(attributes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::ParseOptions;
    use crate::command::tests::{mailbox, parse_line, parse_with};

    fn set(text: &str) -> SequenceSet {
        SequenceSet::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn select() {
        let base = Select { mailbox: mailbox("INBOX"), read_only: false, condstore: false, qresync: None };
        assert_eq!(parse_line("SELECT inbox"), Ok(Command::Select(base.clone())));
        assert_eq!(
            parse_line("EXAMINE \"InBox\" (CONDSTORE)"),
            Ok(Command::Select(Select { read_only: true, condstore: true, ..base.clone() }))
        );
        let qresync = |known_uids: Option<&str>, match_data: Option<(&str, &str)>| {
            let qresync = QResync {
                uid_validity: 67_890_007,
                mod_seq: 90_060_115_194_045_000,
                known_uids: known_uids.map(set),
                match_data: match_data.map(|(a, b)| (set(a), set(b))),
            };
            Ok(Command::Select(Select { qresync: Some(qresync), ..base.clone() }))
        };
        let line = |rest: &str| parse_line(&format!("SELECT INBOX (QRESYNC (67890007 90060115194045000{rest}))"));
        // Trap 21: QRESYNC without UIDs.
        assert_eq!(line(""), qresync(None, None));
        assert_eq!(line(" 41,43:211"), qresync(Some("41,43:211"), None));
        assert_eq!(line(" 1:9 (5,7 20,40)"), qresync(Some("1:9"), Some(("5,7", "20,40"))));
        assert_eq!(line(" (5,7 20,40)"), qresync(None, Some(("5,7", "20,40"))));
        for bad in [" 1:*", " ", " $", " 1 ()", " (1)"] {
            assert!(line(bad).is_err(), "{bad}");
        }
        assert!(parse_line("SELECT INBOX ()").is_err() && parse_line("SELECT").is_err());
    }

    #[test]
    fn names() {
        assert_eq!(parse_line("DELETE Entw&APw-rfe"), Ok(Command::Delete(mailbox("Entwürfe"))));
        assert_eq!(parse_line("RENAME a \"b c\""), Ok(Command::Rename { from: mailbox("a"), to: mailbox("b c") }));
        assert_eq!(parse_line("SUBSCRIBE {3+}\r\na\\b"), Ok(Command::Subscribe(mailbox("a\\b"))));
        assert_eq!(parse_line("UNSUBSCRIBE a*"), Err("BAD Unexpected text after the command".into()));
        assert_eq!(parse_line("DELETE a&b"), Err("NO [CANNOT] Mailbox name is not valid modified UTF-7".into()));
        let utf8 = ParseOptions { utf8: true };
        assert_eq!(parse_with("DELETE \"ü&b\"", utf8), Ok(Command::Delete(mailbox("ü&b"))));
        assert_eq!(parse_line("DELETE {3+}\r\na\0b"), Err("BAD NUL in literal".into()));
    }

    #[test]
    fn create() {
        assert_eq!(parse_line("CREATE x"), Ok(Command::Create { mailbox: mailbox("x"), special_use: vec![] }));
        assert_eq!(
            parse_line("CREATE x (USE (\\Drafts \\Sent))"),
            Ok(Command::Create { mailbox: mailbox("x"), special_use: vec!["Drafts".into(), "Sent".into()] })
        );
        assert!(parse_line("CREATE x (FOO)").is_err());
    }

    fn list(line: &str) -> List {
        match parse_line(line) {
            Ok(Command::List(list)) => list,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn plain_list() {
        let found = list("LIST \"\" *");
        assert_eq!((found.extended, &found.reference[..], &found.patterns[..]), (false, "", &["*".to_owned()][..]));
        assert_eq!(list("LIST inbox/ %").reference, "inbox/");
        assert_eq!(list("LIST \"\" inbox").patterns, ["inbox"]);
        assert_eq!(list("LIST \"\" Entw&APw-rfe/%").patterns, ["Entwürfe/%"]);
        assert_eq!(list("LIST \"\" \"a&*\"").patterns, ["a&*"]);
        assert_eq!(parse_line("LSUB \"\" \"%\""), Ok(Command::Lsub { reference: String::new(), pattern: "%".into() }));
    }

    #[test]
    fn extended_list() {
        let found =
            list("LIST (SUBSCRIBED RECURSIVEMATCH) \"\" (% a) RETURN (CHILDREN STATUS (MESSAGES UNSEEN) SPECIAL-USE)");
        assert_eq!(found.select, ListSelect { subscribed: true, recursive_match: true, ..Default::default() });
        assert_eq!(found.patterns, ["%", "a"]);
        assert_eq!(
            found.returns,
            ListReturn {
                subscribed: false,
                children: true,
                special_use: true,
                status: vec![StatusAttribute::Messages, StatusAttribute::Unseen]
            }
        );
        assert!(list("LIST () \"\" % RETURN ()").extended);
        for bad in [
            "LIST (RECURSIVEMATCH) \"\" %",
            "LIST (REMOTE RECURSIVEMATCH) \"\" %",
            "LIST (FOO) \"\" %",
            "LIST \"\" ()",
            "LIST \"\" % RETURN",
            "LIST \"\" % RETURN (FOO)",
            "LIST \"\"",
            "LIST",
        ] {
            assert!(parse_line(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn status() {
        assert_eq!(
            parse_line("STATUS blurdybloop (UIDNEXT MESSAGES UIDNEXT)"),
            Ok(Command::Status {
                mailbox: mailbox("blurdybloop"),
                attributes: vec![StatusAttribute::UidNext, StatusAttribute::Messages]
            })
        );
        for bad in ["STATUS a ()", "STATUS a (FOO)", "STATUS a MESSAGES", "STATUS a (MESSAGES", "STATUS a"] {
            assert!(parse_line(bad).is_err(), "{bad}");
        }
    }
}
