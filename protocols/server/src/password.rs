//! Passwords: hashed with Argon2id, verified off the workers, and remembered for a while once verified.
//!
//! - A stored hash is a PHC string and carries its own parameters.
//! - An unknown user costs as much time as a wrong password: both are verified, against [`Passwords::decoy`].
//! - The cache key is a keyed hash over everything that decides the answer: the account, its stored hash and the password.
//!   A changed password therefore needs no invalidation, and the cache holds nothing that could be tried offline without
//!   the key, which never leaves the process.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use argon2::password_hash::{Output, ParamsString, PasswordHash, Salt, SaltString};
use argon2::{Algorithm, Argon2, Block, Params, Version};

use crate::limits;

/// The parameters that OWASP names first for Argon2id: 19 MiB, two passes, one lane.
const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 2;
const LANES: u32 = 1;
const HASH_BYTES: usize = 32;

fn argon2() -> Argon2<'static> {
    let params = Params::new(MEMORY_KIB, PASSES, LANES, Some(HASH_BYTES)).expect("constants in range");
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

/// Makes hashes, keeping the 19 MiB that each needs.
pub struct Hasher {
    memory: Vec<Block>,
}

impl Hasher {
    pub fn new() -> Self {
        Self { memory: vec![Block::default(); MEMORY_KIB as usize] }
    }

    /// The PHC string of a password. Takes some 20 ms.
    pub fn hash(&mut self, password: &str) -> String {
        let mut salt = [0; 16];
        fill_random(&mut salt);
        let argon2 = argon2();
        let mut out = [0; HASH_BYTES];
        // Only lengths can be wrong, and those are constants or checked before.
        argon2
            .hash_password_into_with_memory(password.as_bytes(), &salt, &mut out, &mut self.memory)
            .expect("lengths fit");
        let salt = SaltString::encode_b64(&salt).expect("16 bytes make a salt");
        let hash = PasswordHash {
            algorithm: Algorithm::Argon2id.ident(),
            version: Some(Version::V0x13.into()),
            params: ParamsString::try_from(argon2.params()).expect("three numbers"),
            salt: Some(Salt::from(&salt)),
            hash: Some(Output::new(&out).expect("32 bytes make an output")),
        };
        hash.to_string()
    }
}

fn fill_random(bytes: &mut [u8]) {
    use std::io::Read;
    let mut random = std::fs::File::open("/dev/urandom").expect("/dev/urandom is there");
    random.read_exact(bytes).expect("/dev/urandom never ends");
}

/// Whether the password is the one of a stored hash, whose parameters count. What cannot be parsed is no password's hash.
fn verify(memory: &mut Vec<Block>, stored: &str, password: &str) -> bool {
    verify_parsed(memory, stored, password).unwrap_or(false)
}

fn verify_parsed(memory: &mut Vec<Block>, stored: &str, password: &str) -> Option<bool> {
    let hash = PasswordHash::new(stored).ok()?;
    let algorithm = Algorithm::try_from(hash.algorithm).ok()?;
    let version = hash.version.map_or(Some(Version::default()), |version| Version::try_from(version).ok())?;
    let params = Params::try_from(&hash).ok()?;
    let expected = hash.hash?;
    let mut salt = [0; Salt::MAX_LENGTH];
    let salt = hash.salt?.decode_b64(&mut salt).ok()?;
    if memory.len() < params.block_count() {
        memory.resize(params.block_count(), Block::default());
    }
    let argon2 = Argon2::new(algorithm, version, params);
    let output = Output::init_with(expected.len(), |out| {
        argon2
            .hash_password_into_with_memory(password.as_bytes(), salt, out, &mut *memory)
            .map_err(|_| argon2::password_hash::Error::Password)
    });
    // Compares in constant time.
    Some(output.ok()? == expected)
}

/// Checks passwords, and remembers those that were right.
pub struct Passwords {
    key: [u8; 32],
    decoy: String,
    /// Memory of verifications at rest. It is kept: the allocator would keep several times as much.
    memory: Mutex<Vec<Vec<Block>>>,
    verified: Mutex<Verified>,
}

/// The younger half and the older half of what is remembered.
#[derive(Default)]
struct Verified {
    young: HashSet<[u8; 32]>,
    old: HashSet<[u8; 32]>,
}

impl Passwords {
    pub fn new() -> Self {
        let mut key = [0; 32];
        fill_random(&mut key);
        Self {
            key,
            decoy: Hasher::new().hash("no user has this password"),
            memory: Mutex::default(),
            verified: Mutex::default(),
        }
    }

    /// Whether this very combination has been verified before. Takes about a microsecond.
    pub fn is_remembered(&self, account: u64, stored: &str, password: &str) -> bool {
        let key = self.cache_key(account, stored, password);
        let mut verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        if verified.young.contains(&key) {
            return true;
        }
        let known = verified.old.remove(&key);
        if known {
            verified.remember(key);
        }
        known
    }

    /// Verifies a password; `None` is a user that does not exist. Takes some 20 ms: not for a worker.
    pub fn verify(&self, account: Option<(u64, &str)>, password: &str) -> bool {
        if password.len() > limits::PASSWORD_BYTES {
            return false;
        }
        let Some((account, stored)) = account.filter(|(_, stored)| !stored.is_empty()) else {
            let _ = self.verify_hash(&self.decoy, password);
            return false;
        };
        let right = self.verify_hash(stored, password);
        if right {
            let key = self.cache_key(account, stored, password);
            self.verified.lock().unwrap_or_else(PoisonError::into_inner).remember(key);
        }
        right
    }

    fn verify_hash(&self, stored: &str, password: &str) -> bool {
        let at_rest = || self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let mut memory = at_rest().pop().unwrap_or_default();
        let right = verify(&mut memory, stored, password);
        // There are never more than run at a time. Hashes of others may need more; that much is not kept.
        if memory.len() <= MEMORY_KIB as usize {
            at_rest().push(memory);
        }
        right
    }

    fn cache_key(&self, account: u64, stored: &str, password: &str) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&account.to_le_bytes());
        hasher.update(&(stored.len() as u64).to_le_bytes());
        hasher.update(stored.as_bytes());
        hasher.update(password.as_bytes());
        *hasher.finalize().as_bytes()
    }
}

impl Verified {
    fn remember(&mut self, key: [u8; 32]) {
        if self.young.len() >= limits::PASSWORDS_CACHED / 2 {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key);
    }
}

/// What a line of an import, or the operator, gives as a password.
#[derive(Debug, PartialEq, Eq)]
pub enum Given<'a> {
    Hash(&'a str),
    Plain(&'a str),
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PasswordError {
    #[error("the password scheme {{{0}}} is not known: {{PLAIN}}, {{ARGON2ID}} and plain $argon2id$ hashes are")]
    Scheme(String),
    #[error("the hash is not a well-formed $argon2id$ string")]
    Hash,
    #[error("the password is empty")]
    Empty,
    #[error("the password is longer than {} octets", limits::PASSWORD_BYTES)]
    TooLong,
}

/// Reads `password`, `{PLAIN}password`, `{ARGON2ID}$argon2id$...` or `$argon2id$...`.
///
/// # Errors
/// A scheme that is not known; it is not taken for a part of the password, since then nobody could log in with it.
pub fn parse_given(text: &str) -> Result<Given<'_>, PasswordError> {
    let scheme = text.strip_prefix('{').and_then(|rest| rest.split_once('}'));
    let given = match scheme {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("PLAIN") => Given::Plain(rest),
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("ARGON2ID") => Given::Hash(rest),
        Some((scheme, _)) if is_scheme(scheme) => return Err(PasswordError::Scheme(scheme.to_owned())),
        _ if text.starts_with("$argon2id$") => Given::Hash(text),
        _ if is_crypt_hash(text) => {
            let scheme = text.split('$').nth(1).unwrap_or_default();
            return Err(PasswordError::Scheme(format!("${scheme}$")));
        }
        _ => Given::Plain(text),
    };
    match given {
        Given::Hash(hash) => {
            let parsed = PasswordHash::new(hash).map_err(|_| PasswordError::Hash)?;
            let whole =
                parsed.algorithm == Algorithm::Argon2id.ident() && parsed.salt.is_some() && parsed.hash.is_some();
            if !whole || Params::try_from(&parsed).is_err() {
                return Err(PasswordError::Hash);
            }
        }
        Given::Plain("") => return Err(PasswordError::Empty),
        Given::Plain(password) if password.len() > limits::PASSWORD_BYTES => return Err(PasswordError::TooLong),
        Given::Plain(_) => {}
    }
    Ok(given)
}

fn is_scheme(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
}

/// `$id$salt$hash`, as crypt(3) has it.
fn is_crypt_hash(text: &str) -> bool {
    let mut fields = text.split('$');
    fields.next() == Some("") && fields.next().is_some_and(is_scheme) && fields.clone().count() >= 2 && text.len() > 20
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_verifies_its_password_only() {
        let (mut hasher, mut memory) = (Hasher::new(), Vec::new());
        let (first, second) = (hasher.hash("secret"), hasher.hash("secret"));
        assert!(first.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{first}");
        assert_ne!(first, second, "each has its own salt");
        for hash in [&first, &second] {
            assert!(verify(&mut memory, hash, "secret"));
            assert!(!verify(&mut memory, hash, "Secret"));
        }
        assert!(!verify(&mut memory, "", "secret"));
        assert!(!verify(&mut memory, "secret", "secret"));
        // From the tests of the reference implementation: hashes made elsewhere can be imported.
        let foreign = "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc";
        assert!(verify(&mut memory, foreign, "password"));
    }

    /// Trap 10: the key of the cache has everything that decides the answer.
    #[test]
    fn trap_10_only_what_was_verified_is_remembered() {
        let passwords = Passwords::new();
        let stored = Hasher::new().hash("secret");
        assert!(!passwords.is_remembered(1, &stored, "secret"));
        assert!(!passwords.verify(Some((1, &stored)), "wrong"));
        assert!(!passwords.is_remembered(1, &stored, "wrong"));
        assert!(passwords.verify(Some((1, &stored)), "secret"));
        assert!(passwords.is_remembered(1, &stored, "secret"));
        assert!(!passwords.is_remembered(2, &stored, "secret"), "another account");
        assert!(!passwords.is_remembered(1, "$argon2id$other", "secret"), "a changed password");
        assert!(!passwords.is_remembered(1, &stored, "wrong"));
        assert!(!passwords.verify(None, "secret"));
        assert!(!passwords.verify(Some((1, "")), ""));
    }

    #[test]
    fn the_cache_is_bounded_and_keeps_what_is_used() {
        let passwords = Passwords::new();
        let used = passwords.cache_key(0, "stored", "password");
        passwords.verified.lock().unwrap().remember(used);
        for account in 1..3 * limits::PASSWORDS_CACHED as u64 {
            let key = passwords.cache_key(account, "stored", "password");
            passwords.verified.lock().unwrap().remember(key);
            if account % 1000 == 0 {
                assert!(passwords.is_remembered(0, "stored", "password"), "{account}");
            }
        }
        let verified = passwords.verified.lock().unwrap();
        assert!(verified.young.len() + verified.old.len() <= limits::PASSWORDS_CACHED);
    }

    #[test]
    fn schemes() {
        let hash = Hasher::new().hash("x");
        assert_eq!(parse_given(&hash), Ok(Given::Hash(&hash)));
        let with_scheme = format!("{{ARGON2ID}}{hash}");
        assert_eq!(parse_given(&with_scheme), Ok(Given::Hash(&hash)));
        assert_eq!(parse_given("{PLAIN}a{b}"), Ok(Given::Plain("a{b}")));
        assert_eq!(parse_given("{plain}{x}y"), Ok(Given::Plain("{x}y")));
        assert_eq!(parse_given("a:b$c"), Ok(Given::Plain("a:b$c")));
        assert_eq!(parse_given("{open"), Ok(Given::Plain("{open")));
        assert_eq!(parse_given("{SSHA512}abc"), Err(PasswordError::Scheme("SSHA512".into())));
        assert_eq!(parse_given("$6$saltsaltsalt$hashhashhash"), Err(PasswordError::Scheme("$6$".into())));
        assert_eq!(parse_given("{ARGON2ID}abc"), Err(PasswordError::Hash));
        assert_eq!(parse_given("$argon2id$v=19$m=1,t=0,p=1$c29tZXNhbHQ"), Err(PasswordError::Hash));
        assert_eq!(parse_given(""), Err(PasswordError::Empty));
        assert_eq!(parse_given(&"x".repeat(1025)), Err(PasswordError::TooLong));
    }
}
