//! Account names: addresses in their one spelling.

use posthaste_smtp::Mailbox;

use crate::limits;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address that mail can be delivered to")]
pub struct NameError(String);

/// The name of an account: an address, or a local part alone, in lower case.
///
/// # Errors
/// What RCPT TO could not name either.
pub fn normalise(name: &str) -> Result<String, NameError> {
    let error = || NameError(name.to_owned());
    let name = name.trim();
    if name.len() > limits::NAME_BYTES {
        return Err(error());
    }
    let mailbox = Mailbox::parse(name).map_err(|_| error())?;
    let name = key(&mailbox);
    // A colon would end the name in an import, and nothing is gained by the rest.
    let bad = |c: char| c.is_whitespace() || c.is_control() || matches!(c, ':' | '"' | '<' | '>' | '(' | ')' | ',');
    if mailbox.local_part().is_empty() || mailbox.local_part().chars().any(bad) {
        return Err(error());
    }
    Ok(name)
}

/// The spelling under which an account is looked up.
fn key(mailbox: &Mailbox) -> String {
    join(mailbox.local_part(), mailbox.domain())
}

fn join(local_part: &str, domain: &str) -> String {
    let at = if domain.is_empty() { "" } else { "@" };
    let name = format!("{local_part}{at}{domain}");
    if name.is_ascii() { name.to_ascii_lowercase() } else { name.to_lowercase() }
}

/// Looks up the account that a recipient means: the address as it is, else without its +detail (RFC 5233).
pub fn find_recipient<T>(mailbox: &Mailbox, find: impl Fn(&str) -> Option<T>) -> Option<T> {
    find(&key(mailbox)).or_else(|| {
        let (user, _detail) = mailbox.local_part().split_once('+')?;
        if user.is_empty() { None } else { find(&join(user, mailbox.domain())) }
    })
}

/// Whether a recipient is the postmaster of this server (RFC 5321, 4.5.1): without a domain, or of one that is ours for sure.
pub fn is_postmaster(mailbox: &Mailbox, host_name: &str, postmaster: &str) -> bool {
    let domain = mailbox.domain();
    let ours = domain.is_empty()
        || domain.eq_ignore_ascii_case(host_name)
        || postmaster.rsplit_once('@').is_some_and(|(_, own)| domain.eq_ignore_ascii_case(own));
    ours && mailbox.local_part().eq_ignore_ascii_case("postmaster")
}

/// The spelling of a user name that a client logs in with. It need not be an address: then no account has it.
pub fn login_key(name: &str) -> String {
    name.trim().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_one_spelling() {
        assert_eq!(normalise("Ann@Example.ORG").unwrap(), "ann@example.org");
        assert_eq!(normalise("ann").unwrap(), "ann");
        assert_eq!(normalise("\"ann\"@x").unwrap(), "ann@x");
        assert_eq!(normalise("ÄNN@x").unwrap(), "änn@x");
        for bad in ["", "@x", "a b@x", "\"a b\"@x", "a@", "a@b@c", "<a@b>", "a:b@c", "\"a:b\"@c", "a\n@x"] {
            assert!(normalise(bad).is_err(), "{bad:?}");
        }
        assert!(normalise(&format!("{}@x", "a".repeat(300))).is_err());
    }

    #[test]
    fn the_postmaster() {
        let is = |text: &str| is_postmaster(&Mailbox::parse(text).unwrap(), "mx.example", "ann@x");
        assert!(is("Postmaster") && is("POSTMASTER@X") && is("postmaster@mx.example"));
        assert!(!is("postmaster@other") && !is("ann@x"));
    }

    #[test]
    fn details_are_left_out() {
        let find = |address: &str| {
            find_recipient(&Mailbox::parse(address).unwrap(), |name| {
                ["ann@x", "bob+list@x"].contains(&name).then(|| name.to_owned())
            })
        };
        assert_eq!(find("Ann@X"), Some("ann@x".into()));
        assert_eq!(find("ann+a+b@x"), Some("ann@x".into()));
        assert_eq!(find("bob+list@x"), Some("bob+list@x".into()), "an account of that very name");
        assert_eq!(find("bob@x"), None);
        assert_eq!(find("+ann@x"), None);
    }
}
