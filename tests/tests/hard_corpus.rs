//! Hard and broken mail: it comes out byte for byte, what is said of its structure keeps to the formal syntax, and every part
//! that is named can be fetched and is what was said of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use posthaste_tests::clients::{Imap, Status};
use posthaste_tests::imap_grammar::{Body, Item, Part, parse_fetch};
use posthaste_tests::server::{self, Store};

const CONNECTIONS: usize = 4;
const USER: &str = "hard@example.org";
const PASSWORD: &str = "secret";
/// Sections of one FETCH.
const SECTIONS: usize = 60;

fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(directory).expect("the corpus can be read");
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("the corpus can be read").path()).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "eml") {
            found.push(path);
        }
    }
}

/// Every LF without CR becomes CRLF; other CRs stay.
fn to_crlf(raw: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(raw.len() + raw.len() / 32);
    for (at, &octet) in raw.iter().enumerate() {
        if octet == b'\n' && (at == 0 || raw[at - 1] != b'\r') {
            out.push(b'\r');
        }
        out.push(octet);
    }
    out
}

/// The items of the one message that a FETCH of a UID gives.
fn fetch(imap: &mut Imap, uid: &str, items: &str) -> Result<Vec<Item>, String> {
    let done = imap.command(&format!("UID FETCH {uid} ({items})")).map_err(|error| error.to_string())?;
    if done.status != Status::Ok {
        return Err(format!("{items}: {}", done.text));
    }
    let mut found = Vec::new();
    for untagged in &done.untagged {
        let response = untagged.response();
        if response.numbered("FETCH").is_some() {
            found.extend(parse_fetch(response.bytes)?.1);
        }
    }
    Ok(found)
}

fn section<'i>(items: &'i [Item], name: &str) -> Result<&'i [u8], String> {
    let found = items.iter().find_map(|item| match item {
        Item::Section(section, text) if section == name => Some(text),
        _ => None,
    });
    let text = found.ok_or_else(|| format!("no BODY[{name}]"))?;
    text.as_deref().ok_or_else(|| format!("BODY[{name}] is NIL"))
}

fn line_ends(text: &[u8]) -> u32 {
    text.iter().filter(|&&octet| octet == b'\n').count() as u32
}

fn contains(text: &[u8], piece: &[u8]) -> bool {
    piece.is_empty() || text.windows(piece.len()).any(|window| window == piece)
}

/// Fetches the sections of a part and compares them with what BODYSTRUCTURE says.
fn check_part(part: &Part, items: &[Item], whole: &[u8]) -> Result<(), String> {
    let number = &part.number;
    let text = section(items, number)?;
    if let Some(octets) = part.octets
        && text.len() != octets as usize
    {
        return Err(format!("BODY[{number}] has {} octets, BODYSTRUCTURE says {octets}", text.len()));
    }
    if let Some(lines) = part.lines
        && line_ends(text) != lines
    {
        return Err(format!("BODY[{number}] has {} lines, BODYSTRUCTURE says {lines}", line_ends(text)));
    }
    let header = section(items, &format!("{number}.MIME"))?;
    if !contains(whole, &text[..text.len().min(100)]) || !contains(whole, &header[..header.len().min(100)]) {
        return Err(format!("BODY[{number}] or its MIME header is not in the message"));
    }
    if part.is_message {
        let header = section(items, &format!("{number}.HEADER"))?;
        let body = section(items, &format!("{number}.TEXT"))?;
        if [header, body].concat() != text {
            return Err(format!("BODY[{number}] is not its HEADER and its TEXT"));
        }
    }
    Ok(())
}

fn sections_of(part: &Part) -> Vec<String> {
    let number = &part.number;
    let mut sections = vec![number.clone(), format!("{number}.MIME")];
    if part.is_message {
        sections.extend([format!("{number}.HEADER"), format!("{number}.TEXT")]);
    }
    sections
}

fn check_message(imap: &mut Imap, uid: &str, message: &[u8]) -> Result<usize, String> {
    let items =
        fetch(imap, uid, "UID RFC822.SIZE ENVELOPE BODY BODYSTRUCTURE BODY.PEEK[] BODY.PEEK[HEADER] BODY.PEEK[TEXT]")?;
    if section(&items, "")? != message {
        return Err("BODY[] is not what was appended".to_owned());
    }
    if [section(&items, "HEADER")?, section(&items, "TEXT")?].concat() != message {
        return Err("HEADER and TEXT are not the message".to_owned());
    }
    if !items.contains(&Item::Size(message.len() as u32)) {
        return Err("RFC822.SIZE is wrong".to_owned());
    }
    let find = |pick: fn(&Item) -> Option<&Body>| items.iter().find_map(pick).ok_or("no structure");
    let body = find(|item| if let Item::Body(body) = item { Some(body) } else { None })?;
    let structure = find(|item| if let Item::BodyStructure(body) = item { Some(body) } else { None })?;
    if !body.is_same_without_extension(structure) {
        return Err("BODY and BODYSTRUCTURE differ".to_owned());
    }
    let parts = structure.parts();
    for parts in parts.chunks(SECTIONS / 4) {
        let names = parts.iter().flat_map(sections_of).map(|section| format!("BODY.PEEK[{section}]"));
        let items = fetch(imap, uid, &names.collect::<Vec<_>>().join(" "))?;
        for part in parts {
            check_part(part, &items, message)?;
        }
    }
    Ok(parts.len())
}

/// Appends a message and looks at it. False if it was refused, as it must be.
fn check(imap: &mut Imap, message: &[u8]) -> Result<Option<usize>, String> {
    let done = imap.append("INBOX", "", message).map_err(|error| error.to_string())?;
    if message.contains(&0) {
        let refused = done.status == Status::No && done.text.contains("NUL");
        return if refused { Ok(None) } else { Err(format!("NUL was not refused: {}", done.text)) };
    }
    let uid = done.code("APPENDUID").and_then(|words| words.get(1).cloned());
    let uid = uid.ok_or_else(|| format!("not appended: {}", done.text))?;
    check_message(imap, &uid, message).map(Some)
}

#[test]
fn hard_mail_is_described_as_it_is() {
    let Some(path) = server::corpus() else { return };
    let mut paths = Vec::new();
    files(&path.join("hard"), &mut paths);
    assert!(paths.len() > 1000, "{} files", paths.len());
    let store = Store::new(&["store.shards=2"], &["--plaintext-auth"]).expect("a directory can be made");
    store.add_users(&[USER.to_owned()], PASSWORD).expect("users can be added");
    let server = store.start().expect("the server starts");

    let (next, parts, refused) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let wrong = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..CONNECTIONS {
            scope.spawn(|| {
                let mut imap = Imap::connect(server.imap()).expect("the server listens");
                imap.login(USER, PASSWORD).expect("the password is right");
                imap.select("INBOX").expect("it is there");
                while let Some(path) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let message = to_crlf(&fs::read(path).expect("the corpus can be read"));
                    let name = path.display();
                    match check(&mut imap, &message) {
                        Ok(Some(count)) => _ = parts.fetch_add(count, Ordering::Relaxed),
                        Ok(None) => _ = refused.fetch_add(1, Ordering::Relaxed),
                        Err(error) if message.is_empty() => println!("{name} is empty: {error}"),
                        Err(error) => wrong.lock().expect("no thread panics with it").push(format!("{name}: {error}")),
                    }
                }
                imap.logout().expect("the session is sound");
            });
        }
    });
    let wrong = wrong.into_inner().expect("no thread panics with it");
    println!(
        "{} messages with {} parts, {} refused for NUL",
        paths.len(),
        parts.into_inner(),
        refused.load(Ordering::Relaxed)
    );
    assert!(wrong.is_empty(), "{} messages:\n{}", wrong.len(), wrong.join("\n"));
    assert!(refused.into_inner() > 0);
    server.stop().expect("the server stops");
    store.run(&["check"]).expect("the store is sound");
}
