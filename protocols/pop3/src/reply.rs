//! Replies. No octet of a client's comes into one.

/// What a machine can read of a refusal (RFC 2449, 8; RFC 3206).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The maildrop is locked by another session.
    InUse,
    /// The server's fault, which may pass.
    SysTemp,
    /// The server's fault, which somebody has to mend.
    SysPerm,
    /// The user name and the password are not right: nothing else may be answered so, because clients drop them then.
    Auth,
}

impl Code {
    fn text(self) -> &'static str {
        match self {
            Self::InUse => "[IN-USE] ",
            Self::SysTemp => "[SYS/TEMP] ",
            Self::SysPerm => "[SYS/PERM] ",
            Self::Auth => "[AUTH] ",
        }
    }
}

/// Why something is not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    pub code: Option<Code>,
    /// What happened, and what the reader can do about it.
    pub text: &'static str,
}

impl Refusal {
    pub const fn new(text: &'static str) -> Self {
        Self { code: None, text }
    }

    pub const fn coded(code: Code, text: &'static str) -> Self {
        Self { code: Some(code), text }
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"-ERR ");
        out.extend_from_slice(self.code.map_or("", Code::text).as_bytes());
        out.extend_from_slice(self.text.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
}

pub fn write_ok(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(b"+OK ");
    out.extend_from_slice(text.as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// Appends a number in decimal.
pub fn write_number(out: &mut Vec<u8>, number: u64) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    let mut rest = number;
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for number in [0, 7, 10, 4_294_967_295, u64::MAX] {
            let mut out = Vec::new();
            write_number(&mut out, number);
            assert_eq!(String::from_utf8(out).unwrap(), number.to_string());
        }
    }

    #[test]
    fn refusals() {
        let mut out = Vec::new();
        Refusal::new("No").write(&mut out);
        Refusal::coded(Code::InUse, "No").write(&mut out);
        Refusal::coded(Code::SysTemp, "No").write(&mut out);
        assert_eq!(out, b"-ERR No\r\n-ERR [IN-USE] No\r\n-ERR [SYS/TEMP] No\r\n");
    }
}
