//! Mail made up by rule: the same messages for the same seed, with sizes from a stated distribution, and with headers, text and
//! attachments that compress about as real mail does.
//!
//! Text is words of a fixed vocabulary by Zipf's law, in sentences and lines. From 2 KB on half of the messages have an HTML
//! part; what is larger than 24 KB is mostly, and above 100 KB always, an attachment in base64 that does not compress.

use std::collections::VecDeque;
use std::error::Error;
use std::fmt::{self, Write};

use clap::Args;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, RngExt, SeedableRng};
use rand_distr::{Distribution, LogNormal, Zipf};

use crate::corpus::{Corpus, Mail};

/// Below this a message has one part of plain text.
const HTML_BYTES_MIN: usize = 2 << 10;
/// From this on a message may have an attachment.
const ATTACHMENT_BYTES_MIN: usize = 24 << 10;
/// From this on it has one.
const ATTACHMENT_BYTES_SURE: usize = 100 << 10;
/// Text beside an attachment.
const TEXT_BESIDE_ATTACHMENT_BYTES: usize = 1500;
/// Fields that relays and signers add are put in while the header is below this, or a third of the message.
const TRACE_BYTES_MAX: usize = 2500;
/// Words that text consists of.
const VOCABULARY: usize = 6000;
/// People who write.
const PEOPLE: usize = 500;
/// Messages to which later ones reply.
const THREADS_REMEMBERED: usize = 64;
/// RFC 2045, 6.8.
const BASE64_LINE_OCTETS: usize = 76;
const TEXT_LINE_OCTETS: usize = 72;

/// The sizes of generated messages: log-normal, so that few large ones have most octets.
#[derive(Clone, Copy, Debug, PartialEq, Args)]
pub struct Sizes {
    /// The generator's median size
    #[arg(long = "size-median", value_name = "BYTES", default_value_t = 12_000)]
    pub median: u64,
    /// The generator's mean size, before sizes are capped
    #[arg(long = "size-mean", value_name = "BYTES", default_value_t = 75_000)]
    pub mean: u64,
    /// The largest size that the generator makes of a larger one
    #[arg(long = "size-max", value_name = "BYTES", default_value_t = 10_000_000)]
    pub max: u64,
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { median, mean, max } = self;
        write!(f, "log-normal sizes of median {median} and mean {mean} bytes, at most {max}")
    }
}

impl Sizes {
    /// The logarithm of the size is normal: its mean is ln(median), and the mean of the sizes is median * exp(sigma^2 / 2).
    fn distribution(&self) -> Result<LogNormal<f64>, Box<dyn Error>> {
        if self.median == 0 || self.mean < self.median || self.max < self.median {
            return Err(format!("sizes need 0 < median <= mean and median <= max: {self}").into());
        }
        let (median, mean) = (self.median as f64, self.mean as f64);
        let sigma = (2.0 * (mean / median).ln()).sqrt();
        Ok(LogNormal::new(median.ln(), sigma)?)
    }
}

/// Makes messages one after another.
#[derive(Debug)]
pub struct Generator {
    random: Xoshiro256PlusPlus,
    sizes: LogNormal<f64>,
    size_max: u64,
    words: Vec<String>,
    word: Zipf<f64>,
    person: Zipf<f64>,
    people: Vec<(String, String)>,
    /// Ids and subjects of the messages before.
    threads: VecDeque<(String, String)>,
    made: u64,
}

impl Generator {
    /// # Errors
    /// The sizes make no distribution.
    pub fn new(sizes: &Sizes, seed: u64) -> Result<Self, Box<dyn Error>> {
        // One language for all seeds.
        let mut random = Xoshiro256PlusPlus::seed_from_u64(0);
        let words = vocabulary(&mut random);
        let people = (0..PEOPLE).map(|_| person(&mut random, &words)).collect();
        Ok(Self {
            random: Xoshiro256PlusPlus::seed_from_u64(seed),
            sizes: sizes.distribution()?,
            size_max: sizes.max,
            words,
            word: Zipf::new(VOCABULARY as f64, 1.0)?,
            person: Zipf::new(PEOPLE as f64, 1.0)?,
            people,
            threads: VecDeque::new(),
            made: 0,
        })
    }

    /// The next messages as a corpus.
    pub fn corpus(&mut self, count: usize) -> Corpus {
        let mail = (0..count).map(|index| Mail { name: format!("generated {index}"), bytes: self.message() });
        Corpus { mail: mail.collect(), bare_cr: Vec::new() }
    }

    /// The next message, in CRLF form.
    pub fn message(&mut self) -> Vec<u8> {
        let size = self.size();
        self.message_of(size)
    }

    fn size(&mut self) -> usize {
        self.sizes.sample(&mut self.random).min(self.size_max as f64) as usize
    }

    fn message_of(&mut self, size: usize) -> Vec<u8> {
        let mut out = String::with_capacity(size + 1024);
        self.trace(&mut out, size);
        self.header(&mut out);
        self.body(&mut out, size);
        self.made += 1;
        out.into_bytes()
    }

    /// What is on the way between the systems that a message comes through.
    fn trace(&mut self, out: &mut String, size: usize) {
        let room = TRACE_BYTES_MAX.min(size / 3);
        let date = self.date();
        while out.len() < room {
            let (host, id) = (self.host(), self.random.next_u64());
            let address = [0; 4].map(|_: u8| self.random.random_range(1..255_u8));
            let [a, b, c, d] = address;
            field(out, format_args!("Received: from {host} ({host} [{a}.{b}.{c}.{d}])"));
            field(out, format_args!("\tby mx{}.example.org with ESMTPS id {id:016x}", a % 8));
            field(out, format_args!("\tfor <user@example.org>; {date}"));
            if out.len() + 800 < room {
                let domain = host.split_once('.').map_or("example.net", |(_, domain)| domain).to_owned();
                field(out, format_args!("DKIM-Signature: v=1; a=rsa-sha256; c=relaxed/relaxed; d={domain};"));
                field(out, format_args!("\ts=s2026; h=from:to:subject:date:message-id:mime-version;"));
                out.push_str("\tbh=");
                self.base64(out, 44);
                out.push_str(";\r\n\tb=");
                for _ in 0..4 {
                    self.base64(out, 64);
                    out.push_str("\r\n\t ");
                }
                self.base64(out, 64);
                out.push_str("\r\n");
            }
        }
    }

    fn header(&mut self, out: &mut String) {
        let (from, to) = (self.someone(), self.someone());
        let (number, host) = (self.random.next_u64(), self.host());
        let id = format!("<{number:016x}.{}@{host}>", self.made);
        field(out, format_args!("From: {} <{}>", from.0, from.1));
        field(out, format_args!("To: {} <{}>", to.0, to.1));
        let replies = !self.threads.is_empty() && self.random.random_bool(0.4);
        let subject = if replies {
            let (earlier, subject) = self.threads[self.random.random_range(0..self.threads.len())].clone();
            field(out, format_args!("In-Reply-To: {earlier}"));
            field(out, format_args!("References: {earlier}"));
            if subject.starts_with("Re: ") { subject } else { format!("Re: {subject}") }
        } else {
            let count = self.random.random_range(2..9);
            let mut subject = String::new();
            for _ in 0..count {
                if !subject.is_empty() {
                    subject.push(' ');
                }
                let word = self.draw_word();
                subject.push_str(&self.words[word]);
            }
            capitalise(&mut subject, 0);
            subject
        };
        field(out, format_args!("Subject: {subject}"));
        field(out, format_args!("Date: {}", self.date()));
        field(out, format_args!("Message-ID: {id}"));
        field(out, format_args!("MIME-Version: 1.0"));
        if self.threads.len() == THREADS_REMEMBERED {
            self.threads.pop_front();
        }
        self.threads.push_back((id, subject));
    }

    fn body(&mut self, out: &mut String, size: usize) {
        let room = size.saturating_sub(out.len());
        let attachment = room >= ATTACHMENT_BYTES_SURE || room >= ATTACHMENT_BYTES_MIN && self.random.random_bool(0.7);
        if attachment {
            let boundary = self.boundary();
            field(out, format_args!("Content-Type: multipart/mixed; boundary=\"{boundary}\"\r\n"));
            field(out, format_args!("--{boundary}"));
            self.plain(out, TEXT_BESIDE_ATTACHMENT_BYTES);
            field(out, format_args!("--{boundary}"));
            let word = self.draw_word();
            let name = self.words[word].clone();
            let (kind, extension) = [("image/jpeg", "jpg"), ("application/pdf", "pdf"), ("application/zip", "zip")]
                [self.random.random_range(0..3)];
            field(out, format_args!("Content-Type: {kind}; name=\"{name}.{extension}\""));
            field(out, format_args!("Content-Disposition: attachment; filename=\"{name}.{extension}\""));
            field(out, format_args!("Content-Transfer-Encoding: base64\r\n"));
            let last = format!("--{boundary}--\r\n");
            while out.len() + last.len() < size {
                let room = (size - out.len() - last.len()).min(BASE64_LINE_OCTETS);
                self.base64(out, room.next_multiple_of(4));
                out.push_str("\r\n");
            }
            out.push_str(&last);
        } else if room >= HTML_BYTES_MIN && self.random.random_bool(0.5) {
            let boundary = self.boundary();
            field(out, format_args!("Content-Type: multipart/alternative; boundary=\"{boundary}\"\r\n"));
            field(out, format_args!("--{boundary}"));
            self.plain(out, room / 4);
            field(out, format_args!("--{boundary}"));
            self.html(out, size);
            field(out, format_args!("--{boundary}--"));
        } else {
            self.plain(out, room);
        }
    }

    fn plain(&mut self, out: &mut String, octets: usize) {
        field(out, format_args!("Content-Type: text/plain; charset=utf-8"));
        field(out, format_args!("Content-Transfer-Encoding: 7bit\r\n"));
        let end = out.len() + octets.max(40);
        while out.len() < end {
            self.paragraph(out, end);
            out.push_str("\r\n");
        }
    }

    fn html(&mut self, out: &mut String, size: usize) {
        field(out, format_args!("Content-Type: text/html; charset=utf-8"));
        field(out, format_args!("Content-Transfer-Encoding: 7bit\r\n"));
        field(out, format_args!("<!DOCTYPE html>\r\n<html><head><meta charset=\"utf-8\"></head><body>"));
        while out.len() < size {
            let points = self.random.random_range(12..18);
            field(
                out,
                format_args!("<p style=\"margin:0 0 12px 0;font-family:Arial,sans-serif;font-size:{points}px\">"),
            );
            self.paragraph(out, size);
            let (host, id) = (self.host(), self.random.next_u64());
            field(out, format_args!("<a href=\"https://{host}/c/{id:x}?u={}\">", self.made));
            field(out, format_args!("<img src=\"https://{host}/i/{:x}.png\" alt=\"\"></a></p>", id >> 40));
        }
        field(out, format_args!("</body></html>"));
    }

    /// Some sentences in lines.
    fn paragraph(&mut self, out: &mut String, end: usize) {
        let sentences = self.random.random_range(1..6);
        let mut column = 0;
        for _ in 0..sentences {
            let words = self.random.random_range(4..18);
            for number in 0..words {
                let word = self.draw_word();
                let word = &self.words[word];
                if column + word.len() + 2 > TEXT_LINE_OCTETS {
                    out.push_str("\r\n");
                    column = 0;
                } else if column > 0 {
                    out.push(' ');
                    column += 1;
                }
                let start = out.len();
                out.push_str(word);
                if number == 0 {
                    capitalise(out, start);
                }
                column += word.len();
            }
            out.push('.');
            column += 1;
            if out.len() >= end {
                break;
            }
        }
        out.push_str("\r\n");
    }

    /// What would be the base64 of octets without any order; `octets` in multiples of four.
    fn base64(&mut self, out: &mut String, octets: usize) {
        const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut left = octets;
        while left > 0 {
            let mut bits = self.random.next_u64();
            for _ in 0..left.min(10) {
                out.push(char::from(ALPHABET[(bits & 63) as usize]));
                bits >>= 6;
            }
            left -= left.min(10);
        }
    }

    fn draw_word(&mut self) -> usize {
        self.word.sample(&mut self.random) as usize - 1
    }

    fn someone(&mut self) -> (String, String) {
        self.people[self.person.sample(&mut self.random) as usize - 1].clone()
    }

    fn host(&mut self) -> String {
        let number = self.person.sample(&mut self.random) as usize;
        format!("mail{}.{}.example", number % 4, self.words[100 + number])
    }

    fn boundary(&mut self) -> String {
        format!("=_{:016x}", self.random.next_u64())
    }

    /// A minute of November 2026, which began on a Sunday.
    fn date(&self) -> String {
        const MINUTES: u64 = 28 * 24 * 60;
        let minute = self.made % MINUTES;
        let (day, hour, minute) = (minute / 1440, minute / 60 % 24, minute % 60);
        let weekday = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"][(day % 7) as usize];
        format!("{weekday}, {:02} Nov 2026 {hour:02}:{minute:02}:00 +0000", day + 1)
    }
}

fn field(out: &mut String, text: fmt::Arguments<'_>) {
    // Writing to memory does not fail.
    let _ = out.write_fmt(text);
    out.push_str("\r\n");
}

fn capitalise(text: &mut str, at: usize) {
    if let Some(first) = text.get_mut(at..at + 1) {
        first.make_ascii_uppercase();
    }
}

/// The commonest words are English, the others are made of syllables.
fn vocabulary(random: &mut impl Rng) -> Vec<String> {
    const COMMON: &str = "the to and of a in is you that it for i on with be this have are as not we or if can will at \
                          from your by an but please our was all any so me they would has my there do no what which out";
    const ONSETS: [&str; 20] =
        ["b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "v", "w", "st", "pr", "tr", "ch", "sp"];
    const RIMES: [&str; 20] = [
        "a", "e", "i", "o", "al", "an", "ar", "at", "en", "er", "es", "in", "ing", "ion", "it", "on", "or", "ous",
        "um", "y",
    ];
    let mut words: Vec<String> = COMMON.split(' ').map(str::to_owned).collect();
    while words.len() < VOCABULARY {
        let syllables = random.random_range(1..5);
        let mut word = String::new();
        for _ in 0..syllables {
            word.push_str(ONSETS[random.random_range(0..ONSETS.len())]);
            word.push_str(RIMES[random.random_range(0..RIMES.len())]);
        }
        words.push(word);
    }
    words
}

/// A name and an address.
fn person(random: &mut impl Rng, words: &[String]) -> (String, String) {
    let mut name = || {
        let mut name = words[random.random_range(100..words.len())].clone();
        capitalise(&mut name, 0);
        name
    };
    let (given, family, domain) = (name(), name(), name());
    let address = format!("{given}.{family}@{domain}.example").to_ascii_lowercase();
    (format!("{given} {family}"), address)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes { median: 12_000, mean: 75_000, max: 10_000_000 };

    #[test]
    fn a_seed_gives_the_same_mail_and_another_seed_other_mail() {
        let make = |seed| Generator::new(&SIZES, seed).unwrap().corpus(20);
        assert_eq!(make(3), make(3));
        assert_ne!(make(3), make(4));
    }

    /// The standard error of a quantile p's logarithm is sigma * sqrt(p * (1 - p)) / density / sqrt(n).
    #[test]
    fn sizes_are_log_normal() {
        const SEED: u64 = 5;
        const COUNT: usize = 50_000;
        let mut generator = Generator::new(&SIZES, SEED).unwrap();
        let mut sizes: Vec<usize> = (0..COUNT).map(|_| generator.size()).collect();
        sizes.sort_unstable();
        let sigma = (2.0 * (SIZES.mean as f64 / SIZES.median as f64).ln()).sqrt();
        for (quantile, deviation, error) in
            [(0.0228, -2.0, 2.76), (0.1587, -1.0, 1.51), (0.5, 0.0, 1.2533), (0.8413, 1.0, 1.51), (0.9772, 2.0, 2.76)]
        {
            let found = (sizes[(quantile * COUNT as f64) as usize] as f64 / SIZES.median as f64).ln();
            let allowed = 4.0 * sigma * error / (COUNT as f64).sqrt();
            assert!((found - deviation * sigma).abs() < allowed, "seed {SEED}, {quantile}: {found}");
        }
        assert!(sizes[COUNT - 1] <= SIZES.max as usize);
        assert!(sizes.contains(&(SIZES.max as usize)));
    }

    #[test]
    fn messages_have_their_sizes() {
        let mut generator = Generator::new(&SIZES, 8).unwrap();
        for size in (2000..200_000).step_by(9999) {
            let octets = generator.message_of(size).len();
            assert!((size..size + 1500).contains(&octets), "{octets} for {size}");
        }
        assert!(generator.message_of(0).len() < 700);
    }

    #[test]
    fn messages_are_mail() {
        let corpus = Generator::new(&SIZES, 6).unwrap().corpus(300);
        let mut attachments = 0;
        for mail in &corpus.mail {
            let text = str::from_utf8(&mail.bytes).unwrap();
            let (header, body) = text.split_once("\r\n\r\n").unwrap();
            for name in
                ["From: ", "To: ", "Subject: ", "Date: ", "Message-ID: <", "MIME-Version: 1.0", "Content-Type: "]
            {
                assert_eq!(header.lines().filter(|line| line.starts_with(name)).count(), 1, "{name} in {header}");
            }
            assert!(text.ends_with("\r\n") && !body.is_empty());
            assert!(text.split("\r\n").all(|line| line.len() <= 200 && !line.contains(['\r', '\n'])), "{text}");
            if let Some((_, rest)) = header.split_once("boundary=\"") {
                let boundary = rest.split('"').next().unwrap();
                assert_eq!(body.matches(&format!("--{boundary}\r\n")).count(), 2);
                assert!(body.ends_with(&format!("--{boundary}--\r\n")));
                attachments += usize::from(body.contains("base64"));
            }
        }
        let replies =
            corpus.mail.iter().filter(|mail| memchr::memmem::find(&mail.bytes, b"\r\nReferences: <").is_some());
        assert!((70..170).contains(&replies.count()));
        assert!((50..150).contains(&attachments), "{attachments}");
    }

    #[test]
    fn mail_compresses_as_mail_does() {
        // Real mail with its header comes to 0.4 to 0.55 of its size at level 1, random base64 to 0.75.
        let ratio = |bytes: &[u8]| zstd::bulk::compress(bytes, 1).unwrap().len() as f64 / bytes.len() as f64;
        let sizes = Sizes { median: 6000, mean: 6000, max: 6000 };
        let text: Vec<u8> =
            Generator::new(&sizes, 7).unwrap().corpus(200).mail.into_iter().flat_map(|m| m.bytes).collect();
        let each: Vec<f64> = text.chunks(6000).map(ratio).collect();
        let mean = each.iter().sum::<f64>() / each.len() as f64;
        assert!((0.35..0.6).contains(&mean), "{mean}");
        let sizes = Sizes { median: 300_000, mean: 300_000, max: 300_000 };
        let large = Generator::new(&sizes, 7).unwrap().message();
        assert!((0.7..0.8).contains(&ratio(&large)), "{}", ratio(&large));
    }

    #[test]
    fn sizes_that_make_no_distribution_are_refused() {
        for (median, mean, max) in [(0, 1, 1), (10, 9, 100), (10, 20, 9)] {
            assert!(Generator::new(&Sizes { median, mean, max }, 1).is_err());
        }
    }
}
