//! Mail to deliver: a directory of `.eml` files, an archive of one (`.tar`, `.tar.zst`), or made up.

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// One message in CRLF form, ending with CRLF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mail {
    /// Its path below the corpus.
    pub name: String,
    pub bytes: Vec<u8>,
}

/// Messages, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Corpus {
    pub mail: Vec<Mail>,
    /// Messages with a CR that no LF follows. LMTP must not carry them (RFC 5321, 2.3.8); their other line ends are CRLF.
    pub bare_cr: Vec<Mail>,
}

impl Corpus {
    /// Reads a directory with everything below it, or an archive.
    ///
    /// # Errors
    /// It cannot be read, or has no message.
    pub fn load(path: &Path) -> Result<Self, Box<dyn Error>> {
        let mut files = Vec::new();
        let named = |error: io::Error| format!("cannot read the corpus {}: {error}", path.display());
        if path.is_dir() {
            read_directory(path, path, &mut files).map_err(named)?;
        } else {
            read_archive(path, &mut files).map_err(named)?;
        }
        files.sort();
        let mut corpus = Self::default();
        for (name, raw) in files {
            let bytes = to_crlf(without_mbox_line(&raw));
            let list = if has_bare_cr(&bytes) { &mut corpus.bare_cr } else { &mut corpus.mail };
            list.push(Mail { name, bytes });
        }
        if corpus.mail.is_empty() {
            return Err(format!("the corpus {} has no message", path.display()).into());
        }
        Ok(corpus)
    }

    /// Reads an mbox file: messages begin with a line that starts with "From " at the beginning or after an empty line. Lines
    /// that quote such a line have one ">" less (mboxrd).
    ///
    /// # Errors
    /// It cannot be read, or has no message.
    pub fn load_mbox(path: &Path) -> Result<Self, Box<dyn Error>> {
        let raw = fs::read(path).map_err(|error| format!("cannot read the mbox {}: {error}", path.display()))?;
        let mut corpus = Self::default();
        for (index, message) in split_mbox(&raw).into_iter().enumerate() {
            let bytes = to_crlf(&message);
            let list = if has_bare_cr(&bytes) { &mut corpus.bare_cr } else { &mut corpus.mail };
            list.push(Mail { name: format!("message {}", index + 1), bytes });
        }
        if corpus.mail.is_empty() {
            return Err(format!("the mbox {} has no message: they begin with a \"From \" line", path.display()).into());
        }
        Ok(corpus)
    }

    /// One message of exactly `octets`, or of the least that a header takes.
    pub fn synthetic(octets: usize, fill: Fill) -> Self {
        let header = "From: Bench <bench@example.net>\r\nTo: <user@example.org>\r\nSubject: A message of a given size\r\n\
                      Date: Tue, 24 Nov 2026 06:00:00 +0000\r\nMessage-ID: <1@bench.example.net>\r\n\r\n";
        let mut bytes = header.as_bytes().to_vec();
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        while bytes.len() + 2 < octets {
            let room = octets - bytes.len() - 2;
            // What is left must be nothing or a line.
            let room = if room > 78 { 76 } else { room };
            let start = bytes.len();
            while bytes.len() < start + room {
                match fill {
                    Fill::X => bytes.push(b'X'),
                    Fill::Words => {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        let word = WORDS[(state >> 33) as usize % WORDS.len()];
                        bytes.extend_from_slice(word.as_bytes());
                        bytes.push(b' ');
                    }
                }
            }
            bytes.truncate(start + room);
            bytes.extend_from_slice(b"\r\n");
        }
        Self { mail: vec![Mail { name: format!("made up, {octets} octets"), bytes }], bare_cr: Vec::new() }
    }

    /// Octets of all messages that LMTP can carry.
    pub fn octets(&self) -> u64 {
        self.mail.iter().map(|mail| mail.bytes.len() as u64).sum()
    }

    /// Half of the messages have at most so many octets.
    pub fn median_octets(&self) -> u64 {
        let mut octets: Vec<u64> = self.mail.iter().map(|mail| mail.bytes.len() as u64).collect();
        octets.sort_unstable();
        octets.get(octets.len() / 2).copied().unwrap_or(0)
    }
}

/// What a made up message consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Fill {
    /// Words in random order, which compress somewhat
    Words,
    /// The letter X, as Postfix' smtp-source sends it
    X,
}

const WORDS: [&str; 40] = [
    "a", "about", "and", "archive", "as", "at", "attached", "be", "before", "but", "can", "delivery", "for", "from",
    "have", "in", "is", "it", "list", "mail", "message", "my", "not", "of", "on", "patch", "please", "reply", "server",
    "so", "thanks", "that", "the", "this", "to", "version", "we", "will", "with", "you",
];

fn read_directory(root: &Path, directory: &Path, files: &mut Vec<(String, Vec<u8>)>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            read_directory(root, &path, files)?;
        } else if is_message(&path) {
            let name: PathBuf = path.strip_prefix(root).unwrap_or(&path).into();
            files.push((name.display().to_string(), fs::read(&path)?));
        }
    }
    Ok(())
}

fn read_archive(path: &Path, files: &mut Vec<(String, Vec<u8>)>) -> io::Result<()> {
    let file = File::open(path)?;
    let input: Box<dyn Read> = if path.extension().is_some_and(|extension| extension == "zst") {
        Box::new(zstd::Decoder::new(file)?)
    } else {
        Box::new(file)
    };
    let mut archive = tar::Archive::new(input);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = entry.path()?.into_owned();
        if entry.header().entry_type().is_file() && is_message(&name) {
            let mut raw = Vec::new();
            entry.read_to_end(&mut raw)?;
            files.push((name.display().to_string(), raw));
        }
    }
    Ok(())
}

fn is_message(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "eml")
}

fn split_mbox(raw: &[u8]) -> Vec<Vec<u8>> {
    let mut messages: Vec<Vec<u8>> = Vec::new();
    let mut after_empty = true;
    for line in raw.split_inclusive(|&octet| octet == b'\n') {
        let empty = line.trim_ascii().is_empty();
        if after_empty && line.starts_with(b"From ") {
            if let Some(message) = messages.last_mut() {
                // The empty line before belongs to the separator.
                let end = message.strip_suffix(b"\r\n").or(message.strip_suffix(b"\n")).map_or(0, <[u8]>::len);
                message.truncate(end);
            }
            messages.push(Vec::new());
        } else if let Some(message) = messages.last_mut() {
            let quoted = line.iter().take_while(|&&octet| octet == b'>').count();
            let unquoted = if quoted > 0 && line[quoted..].starts_with(b"From ") { &line[1..] } else { line };
            message.extend_from_slice(unquoted);
        }
        after_empty = empty;
    }
    messages
}

/// Drops the line with which mbox files separate messages; it is no header.
pub fn without_mbox_line(raw: &[u8]) -> &[u8] {
    if !raw.starts_with(b"From ") {
        return raw;
    }
    memchr::memchr(b'\n', raw).map_or(&[], |end| &raw[end + 1..])
}

/// Makes every line end CRLF, the last line's too. A CR before something else stays.
pub fn to_crlf(raw: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(raw.len() + raw.len() / 32 + 2);
    for line in raw.split_inclusive(|&octet| octet == b'\n') {
        let text = line.strip_suffix(b"\n").unwrap_or(line);
        out.extend_from_slice(text.strip_suffix(b"\r").unwrap_or(text));
        out.extend_from_slice(b"\r\n");
    }
    out
}

fn has_bare_cr(bytes: &[u8]) -> bool {
    memchr::memchr_iter(b'\r', bytes).any(|at| bytes.get(at + 1) != Some(&b'\n'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_ends_become_crlf() {
        assert_eq!(to_crlf(b"a\nb\r\n\nc"), b"a\r\nb\r\n\r\nc\r\n");
        assert_eq!(to_crlf(b"a\rb\n"), b"a\rb\r\n");
        assert_eq!(to_crlf(b"a\r"), b"a\r\n");
        assert_eq!(to_crlf(b""), b"");
        assert!(has_bare_cr(b"a\rb\r\n"));
        assert!(!has_bare_cr(b"a\r\nb\r\n"));
    }

    #[test]
    fn mbox_lines_go() {
        assert_eq!(without_mbox_line(b"From a@b Tue\nFrom: a\n"), b"From: a\n");
        assert_eq!(without_mbox_line(b"From: a\n"), b"From: a\n");
        assert_eq!(without_mbox_line(b"From "), b"");
    }

    #[test]
    fn an_mbox_is_split() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("mbox");
        let text = b"From a@b Tue\nSubject: 1\n\nFrom here\nit goes on\n>From there\n>>From\n>>From x\n\n\nFrom c Wed\nSubject: 2\n\n2";
        fs::write(&path, text).unwrap();
        let corpus = Corpus::load_mbox(&path).unwrap();
        assert_eq!(corpus.mail.len(), 3);
        assert_eq!(corpus.mail[0].bytes, b"Subject: 1\r\n");
        assert_eq!(corpus.mail[1].bytes, b"it goes on\r\nFrom there\r\n>>From\r\n>From x\r\n\r\n");
        assert_eq!(corpus.mail[2].bytes, b"Subject: 2\r\n\r\n2\r\n");
        assert_eq!(corpus.median_octets(), corpus.mail[2].bytes.len() as u64);
        fs::write(&path, b"Subject: none\n\n").unwrap();
        assert!(Corpus::load_mbox(&path).is_err());
        assert!(Corpus::load_mbox(&directory.path().join("nothing")).is_err());
    }

    #[test]
    fn made_up_mail_has_its_size() {
        for octets in 300..800 {
            for fill in [Fill::Words, Fill::X] {
                let corpus = Corpus::synthetic(octets, fill);
                let bytes = &corpus.mail[0].bytes;
                assert_eq!(bytes.len(), octets);
                assert!(bytes.ends_with(b"\r\n") && !has_bare_cr(bytes));
                assert!(bytes.split(|&octet| octet == b'\n').all(|line| line.len() < 100));
            }
        }
    }

    #[test]
    fn directories_and_archives_give_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("ordinary/list");
        fs::create_dir_all(&below).unwrap();
        fs::write(below.join("2.eml"), b"From x\nSubject: 2\n\n2\n").unwrap();
        fs::write(below.join("1.eml"), b"Subject: 1\r\n\r\n1").unwrap();
        fs::write(below.join("3.eml"), b"Subject: 3\n\n3\r3\n").unwrap();
        fs::write(below.join("README"), b"no mail").unwrap();
        let corpus = Corpus::load(directory.path()).unwrap();
        let names: Vec<_> = corpus.mail.iter().map(|mail| mail.name.as_str()).collect();
        assert_eq!(names, ["ordinary/list/1.eml", "ordinary/list/2.eml"]);
        assert_eq!(corpus.mail[0].bytes, b"Subject: 1\r\n\r\n1\r\n");
        assert_eq!(corpus.mail[1].bytes, b"Subject: 2\r\n\r\n2\r\n");
        assert_eq!(corpus.bare_cr[0].bytes, b"Subject: 3\r\n\r\n3\r3\r\n");

        let path = directory.path().join("corpus.tar.zst");
        let encoder = zstd::Encoder::new(File::create(&path).unwrap(), 1).unwrap();
        let mut builder = tar::Builder::new(encoder);
        builder.append_dir_all("ordinary", directory.path().join("ordinary")).unwrap();
        builder.into_inner().unwrap().finish().unwrap();
        assert_eq!(Corpus::load(&path).unwrap(), corpus);
        assert!(Corpus::load(&directory.path().join("nothing")).is_err());
    }
}
