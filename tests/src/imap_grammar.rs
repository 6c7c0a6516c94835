//! The formal syntax of FETCH responses (RFC 3501, 9), as strict as it is written. It shares nothing with the code that it
//! checks.

/// An item of a FETCH response.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    Envelope(Envelope),
    Body(Body),
    BodyStructure(Body),
    /// The section as it stands between the brackets, and its text.
    Section(String, Option<Vec<u8>>),
    Size(u32),
    Uid(u32),
    Flags(Vec<String>),
    InternalDate(String),
    ModSeq(u64),
}

pub type Text = Option<Vec<u8>>;

#[derive(Clone, Debug, PartialEq)]
pub struct Envelope {
    pub date: Text,
    pub subject: Text,
    /// From, sender, reply-to, to, cc, bcc: of each address name, route, mailbox, host.
    pub addresses: [Vec<[Text; 4]>; 6],
    pub in_reply_to: Text,
    pub message_id: Text,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    Multipart { parts: Vec<Body>, subtype: Vec<u8>, parameters: Vec<(Vec<u8>, Vec<u8>)>, extension: Option<Extension> },
    Single(Box<Single>),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Single {
    pub media_type: Vec<u8>,
    pub subtype: Vec<u8>,
    pub parameters: Vec<(Vec<u8>, Vec<u8>)>,
    pub id: Text,
    pub description: Text,
    pub encoding: Vec<u8>,
    pub octets: u32,
    /// Of text and message parts.
    pub lines: Option<u32>,
    pub message: Option<(Envelope, Body)>,
    pub md5: Text,
    pub extension: Option<Extension>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Extension {
    pub disposition: Option<(Vec<u8>, Vec<(Vec<u8>, Vec<u8>)>)>,
    pub language: Vec<Vec<u8>>,
    pub location: Text,
}

type Parse<T> = Result<T, String>;

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
}

/// `message-data = nz-number SP "FETCH" SP msg-att`, after `"*" SP` and without its CRLF: the number and the items.
///
/// # Errors
/// What breaks the syntax, and where.
pub fn parse_fetch(response: &[u8]) -> Parse<(u32, Vec<Item>)> {
    let mut p = Parser { text: response, at: 0 };
    let parsed = p.fetch();
    parsed.map_err(|what| {
        let around = &response[p.at.saturating_sub(60)..response.len().min(p.at + 40)];
        format!("{what} at {}: {:?}", p.at, String::from_utf8_lossy(around))
    })
}

impl Parser<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn eat(&mut self, token: &str) -> bool {
        let found = self.text[self.at..].starts_with(token.as_bytes());
        self.at += if found { token.len() } else { 0 };
        found
    }

    fn expect(&mut self, token: &str) -> Parse<()> {
        if self.eat(token) { Ok(()) } else { Err(format!("{token:?} expected")) }
    }

    fn digits(&mut self) -> Parse<u64> {
        let start = self.at;
        while self.peek().is_some_and(|octet| octet.is_ascii_digit()) {
            self.at += 1;
        }
        let text = std::str::from_utf8(&self.text[start..self.at]).map_err(|error| error.to_string())?;
        text.parse().map_err(|_| "a number expected".to_owned())
    }

    /// `number = 1*DIGIT`, below 2^32.
    fn number(&mut self) -> Parse<u32> {
        u32::try_from(self.digits()?).map_err(|_| "a number out of range".to_owned())
    }

    fn fetch(&mut self) -> Parse<(u32, Vec<Item>)> {
        self.expect("* ")?;
        let number = self.number()?;
        if number == 0 {
            return Err("the number is 0".to_owned());
        }
        self.expect(" FETCH (")?;
        let mut items = vec![self.item()?];
        while self.eat(" ") {
            items.push(self.item()?);
        }
        self.expect(")")?;
        if self.at == self.text.len() { Ok((number, items)) } else { Err("something follows the list".to_owned()) }
    }

    fn item(&mut self) -> Parse<Item> {
        if self.eat("ENVELOPE ") {
            self.envelope().map(Item::Envelope)
        } else if self.eat("BODYSTRUCTURE ") {
            self.body(true, 0).map(Item::BodyStructure)
        } else if self.eat("BODY ") {
            self.body(false, 0).map(Item::Body)
        } else if self.eat("BODY[") {
            let end = self.text[self.at..].iter().position(|&octet| octet == b']').ok_or("a section without end")?;
            let section = String::from_utf8_lossy(&self.text[self.at..self.at + end]).into_owned();
            self.at += end + 1;
            if self.eat("<") {
                self.number()?;
                self.expect(">")?;
            }
            self.expect(" ")?;
            Ok(Item::Section(section, self.nstring()?))
        } else if self.eat("RFC822.SIZE ") {
            self.number().map(Item::Size)
        } else if self.eat("UID ") {
            self.number().map(Item::Uid)
        } else if self.eat("MODSEQ (") {
            let modseq = self.digits()?;
            self.expect(")")?;
            Ok(Item::ModSeq(modseq))
        } else if self.eat("INTERNALDATE ") {
            Ok(Item::InternalDate(String::from_utf8_lossy(&self.quoted()?).into_owned()))
        } else if self.eat("FLAGS (") {
            let end = self.text[self.at..].iter().position(|&octet| octet == b')').ok_or("flags without end")?;
            let flags = String::from_utf8_lossy(&self.text[self.at..self.at + end]).into_owned();
            self.at += end + 1;
            Ok(Item::Flags(flags.split(' ').filter(|flag| !flag.is_empty()).map(str::to_owned).collect()))
        } else {
            Err("an item expected".to_owned())
        }
    }

    /// `quoted = DQUOTE *QUOTED-CHAR DQUOTE`, `QUOTED-CHAR = <any TEXT-CHAR except quoted-specials> / "\" quoted-specials`,
    /// `TEXT-CHAR = <any CHAR except CR and LF>`, `CHAR = %x01-7F`
    fn quoted(&mut self) -> Parse<Vec<u8>> {
        self.expect("\"")?;
        let mut out = Vec::new();
        loop {
            let octet = self.peek().ok_or("a quoted string without end")?;
            match octet {
                b'"' => {
                    self.at += 1;
                    return Ok(out);
                }
                b'\\' => match self.text.get(self.at + 1) {
                    Some(&escaped @ (b'"' | b'\\')) => {
                        out.push(escaped);
                        self.at += 2;
                    }
                    _ => return Err("a backslash before what is not special".to_owned()),
                },
                b'\r' | b'\n' | 0 | 0x80.. => return Err(format!("octet {octet:#x} in a quoted string")),
                octet => {
                    out.push(octet);
                    self.at += 1;
                }
            }
        }
    }

    /// `string = quoted / literal`, `literal = "{" number "}" CRLF *CHAR8`, `CHAR8 = %x01-ff`
    fn string(&mut self) -> Parse<Vec<u8>> {
        if self.peek() == Some(b'"') {
            return self.quoted();
        }
        self.expect("{")?;
        let octets = self.number()? as usize;
        self.expect("}\r\n")?;
        let literal = self.text.get(self.at..self.at + octets).ok_or("a literal goes past the end")?;
        if literal.contains(&0) {
            return Err("NUL in a literal".to_owned());
        }
        self.at += octets;
        Ok(literal.to_vec())
    }

    /// `nstring = string / nil`
    fn nstring(&mut self) -> Parse<Text> {
        if self.eat("NIL") { Ok(None) } else { self.string().map(Some) }
    }

    fn envelope(&mut self) -> Parse<Envelope> {
        self.expect("(")?;
        let date = self.nstring()?;
        self.expect(" ")?;
        let subject = self.nstring()?;
        let mut addresses: [Vec<[Text; 4]>; 6] = Default::default();
        for list in &mut addresses {
            self.expect(" ")?;
            *list = self.addresses()?;
        }
        self.expect(" ")?;
        let in_reply_to = self.nstring()?;
        self.expect(" ")?;
        let message_id = self.nstring()?;
        self.expect(")")?;
        Ok(Envelope { date, subject, addresses, in_reply_to, message_id })
    }

    /// `env-from = "(" 1*address ")" / nil`, `address = "(" addr-name SP addr-adl SP addr-mailbox SP addr-host ")"`
    fn addresses(&mut self) -> Parse<Vec<[Text; 4]>> {
        if self.eat("NIL") {
            return Ok(Vec::new());
        }
        self.expect("(")?;
        let mut list = Vec::new();
        let mut in_group = false;
        while self.eat("(") {
            let mut address: [Text; 4] = Default::default();
            for (number, field) in address.iter_mut().enumerate() {
                if number > 0 {
                    self.expect(" ")?;
                }
                *field = self.nstring()?;
            }
            self.expect(")")?;
            // addr-mailbox: NIL at the end of a group; addr-host: NIL at its start and its end.
            match (&address[2], &address[3]) {
                (None, Some(_)) => return Err("a host without a mailbox".to_owned()),
                (None, None) if !in_group => return Err("the end of a group that did not begin".to_owned()),
                (None, None) => in_group = false,
                (Some(_), None) if in_group => return Err("a group within a group".to_owned()),
                (Some(_), None) => in_group = true,
                _ => {}
            }
            list.push(address);
        }
        self.expect(")")?;
        match (list.is_empty(), in_group) {
            (true, _) => Err("an empty address list".to_owned()),
            (_, true) => Err("a group without end".to_owned()),
            _ => Ok(list),
        }
    }

    /// `body = "(" (body-type-1part / body-type-mpart) ")"`
    fn body(&mut self, extended: bool, depth: usize) -> Parse<Body> {
        if depth > 200 {
            return Err("nested too deeply for any client".to_owned());
        }
        self.expect("(")?;
        let body = if self.peek() == Some(b'(') {
            // body-type-mpart = 1*body SP media-subtype [SP body-ext-mpart]
            let mut parts = Vec::new();
            while self.peek() == Some(b'(') {
                parts.push(self.body(extended, depth + 1)?);
            }
            self.expect(" ")?;
            let subtype = self.string()?;
            let (mut parameters, mut extension) = (Vec::new(), None);
            if extended && self.eat(" ") {
                parameters = self.parameters()?;
                extension = Some(self.extension()?);
            }
            Body::Multipart { parts, subtype, parameters, extension }
        } else {
            self.single(extended, depth).map(|single| Body::Single(Box::new(single)))?
        };
        self.expect(")")?;
        Ok(body)
    }

    /// `body-type-1part = (body-type-basic / body-type-msg / body-type-text) [SP body-ext-1part]`
    fn single(&mut self, extended: bool, depth: usize) -> Parse<Single> {
        let is_quoted = self.peek() == Some(b'"');
        let media_type = self.string()?;
        self.expect(" ")?;
        let subtype = self.string()?;
        self.expect(" ")?;
        let parameters = self.parameters()?;
        self.expect(" ")?;
        let id = self.nstring()?;
        self.expect(" ")?;
        let description = self.nstring()?;
        self.expect(" ")?;
        let encoding = self.string()?;
        self.expect(" ")?;
        let octets = self.number()?;
        let is_text = media_type.eq_ignore_ascii_case(b"text");
        let is_message = media_type.eq_ignore_ascii_case(b"message") && subtype.eq_ignore_ascii_case(b"rfc822");
        if (is_text || is_message) && !is_quoted {
            return Err("a media type with fields of its own must be quoted".to_owned());
        }
        let (mut lines, mut message) = (None, None);
        if is_message {
            self.expect(" ")?;
            let envelope = self.envelope()?;
            self.expect(" ")?;
            message = Some((envelope, self.body(extended, depth + 1)?));
        }
        if is_text || is_message {
            self.expect(" ")?;
            lines = Some(self.number()?);
        }
        let (mut md5, mut extension) = (None, None);
        if extended && self.eat(" ") {
            md5 = self.nstring()?;
            extension = Some(self.extension()?);
        }
        Ok(Single {
            media_type,
            subtype,
            parameters,
            id,
            description,
            encoding,
            octets,
            lines,
            message,
            md5,
            extension,
        })
    }

    /// `body-fld-param = "(" string SP string *(SP string SP string) ")" / nil`
    fn parameters(&mut self) -> Parse<Vec<(Vec<u8>, Vec<u8>)>> {
        if self.eat("NIL") {
            return Ok(Vec::new());
        }
        self.expect("(")?;
        let mut parameters = Vec::new();
        loop {
            let name = self.string()?;
            self.expect(" ")?;
            parameters.push((name, self.string()?));
            if !self.eat(" ") {
                self.expect(")")?;
                return Ok(parameters);
            }
        }
    }

    /// `[SP body-fld-dsp [SP body-fld-lang [SP body-fld-loc *(SP body-extension)]]]`
    fn extension(&mut self) -> Parse<Extension> {
        let mut extension = Extension::default();
        if !self.eat(" ") {
            return Ok(extension);
        }
        if !self.eat("NIL") {
            self.expect("(")?;
            let disposition = self.string()?;
            self.expect(" ")?;
            extension.disposition = Some((disposition, self.parameters()?));
            self.expect(")")?;
        }
        if !self.eat(" ") {
            return Ok(extension);
        }
        if self.eat("(") {
            loop {
                extension.language.push(self.string()?);
                if !self.eat(" ") {
                    self.expect(")")?;
                    break;
                }
            }
        } else {
            extension.language.extend(self.nstring()?);
        }
        if self.eat(" ") {
            extension.location = self.nstring()?;
        }
        Ok(extension)
    }
}

/// A part that a client can name.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    pub number: String,
    pub octets: Option<u32>,
    pub lines: Option<u32>,
    pub is_message: bool,
}

impl Body {
    /// All parts with the numbers that RFC 3501, 6.4.5 gives them.
    pub fn parts(&self) -> Vec<Part> {
        let mut parts = Vec::new();
        self.number("", &mut parts);
        parts
    }

    /// The parts of a message whose own number is `prefix`, which ends with a dot unless it is empty.
    fn number(&self, prefix: &str, found: &mut Vec<Part>) {
        match self {
            Self::Multipart { parts, .. } => {
                for (index, part) in parts.iter().enumerate() {
                    let number = format!("{prefix}{}", index + 1);
                    match part {
                        Self::Multipart { .. } => {
                            found.push(Part { number: number.clone(), octets: None, lines: None, is_message: false });
                            part.number(&format!("{number}."), found);
                        }
                        Self::Single(single) => single.number(number, found),
                    }
                }
            }
            // A message that is no multipart has one part, 1.
            Self::Single(single) => single.number(format!("{prefix}1"), found),
        }
    }

    /// Whether both say the same, but for extension data.
    pub fn is_same_without_extension(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Multipart { parts, subtype, .. }, Self::Multipart { parts: others, subtype: other, .. }) => {
                subtype == other
                    && parts.len() == others.len()
                    && parts.iter().zip(others).all(|(part, other)| part.is_same_without_extension(other))
            }
            (Self::Single(single), Self::Single(other)) => {
                let message = match (&single.message, &other.message) {
                    (Some(one), Some(other)) => one.0 == other.0 && one.1.is_same_without_extension(&other.1),
                    (one, other) => one.is_none() && other.is_none(),
                };
                let plain = |single: &Single| Single { md5: None, extension: None, message: None, ..single.clone() };
                message && plain(single) == plain(other)
            }
            _ => false,
        }
    }
}

impl Single {
    fn number(&self, number: String, found: &mut Vec<Part>) {
        let is_message = self.message.is_some();
        let (octets, lines) = (Some(self.octets), self.lines);
        found.push(Part { number: number.clone(), octets, lines, is_message });
        if let Some((_, body)) = &self.message {
            body.number(&format!("{number}."), found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_right_and_what_is_wrong() {
        let envelope = "(NIL \"a\\\"b\" NIL NIL NIL ((NIL NIL \"g\" NIL)(NIL NIL \"a\" \"b\")(NIL NIL NIL NIL)) NIL NIL NIL {2}\r\né)";
        let text = "(\"text\" \"plain\" (\"a\" \"b\") NIL NIL \"7bit\" 3 1)";
        let right = format!(
            "* 1 FETCH (ENVELOPE {envelope} BODY ({text}(\"message\" \"rfc822\" NIL NIL NIL \"7bit\" 1 {envelope} {text} 1) \"mixed\"))"
        );
        let (number, items) = parse_fetch(right.as_bytes()).expect("it is right");
        assert_eq!((number, items.len()), (1, 2));
        let Item::Body(body) = &items[1] else { panic!("{items:?}") };
        let numbers: Vec<String> = body.parts().into_iter().map(|part| part.number).collect();
        assert_eq!(numbers, ["1", "2", "2.1"]);
        for (from, to) in [
            ("{2}", "{3}"),
            ("{2}", "{1}"),
            ("é", "\0a"),
            ("\"a\\\"b\"", "\"é\""),
            ("\"a\\\"b\"", "\"a\rb\""),
            ("\"a\\\"b\"", "\"\\a\""),
            ("(NIL NIL NIL NIL))", ")"),
            ("((NIL NIL \"g\"", "() ((NIL NIL \"g\""),
            ("(\"a\" \"b\")", "()"),
            ("(\"a\" \"b\")", "(\"a\")"),
            (" 3 1)", " 3)"),
            (" 3 1)", " 4294967296 1)"),
            ("\"7bit\"", "NIL"),
            (" \"mixed\"", ""),
            ("* 1 ", "* 0 "),
            (" BODY", "  BODY"),
        ] {
            assert!(right.contains(from), "{from:?}");
            let wrong = right.replacen(from, to, 1);
            assert!(parse_fetch(wrong.as_bytes()).is_err(), "{from:?} -> {to:?}");
        }
    }
}
