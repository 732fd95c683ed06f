//! Whom a token is for.

use std::collections::BTreeSet;

/// Maximum number of audiences of a token.
const MAX_AUDIENCES: usize = 8;
/// Maximum length of an audience, in bytes.
const MAX_BYTES: usize = 256;

/// The audiences of a token: one to eight different ones, of at most 256 bytes each.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Audience(BTreeSet<String>);

/// Why these cannot be the audiences of a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAudience {
    /// There is none. A token must have one (JWT-SVID §3.2).
    #[error("no audience is given: name the recipient of the token")]
    None,
    /// There are too many.
    #[error("there are {0} audiences; a token has at most {MAX_AUDIENCES}")]
    TooMany(usize),
    /// One is empty, too long, or has control characters.
    #[error("an audience is empty, longer than {MAX_BYTES} bytes, or has control characters")]
    Text,
}

impl Audience {
    /// Returns the audiences as they are in a token.
    pub fn to_vec(&self) -> Vec<String> {
        self.0.iter().cloned().collect()
    }

    /// Returns the first audience in alphabetical order.
    pub fn first(&self) -> &str {
        self.0.first().map(String::as_str).unwrap_or_default()
    }
}

impl TryFrom<Vec<String>> for Audience {
    type Error = InvalidAudience;

    fn try_from(names: Vec<String>) -> Result<Self, InvalidAudience> {
        match names.len() {
            0 => return Err(InvalidAudience::None),
            1..=MAX_AUDIENCES => {}
            many => return Err(InvalidAudience::TooMany(many)),
        }
        let usable = |name: &String| {
            (1..=MAX_BYTES).contains(&name.len()) && !name.chars().any(char::is_control)
        };
        match names.iter().all(usable) {
            true => Ok(Self(names.into_iter().collect())),
            false => Err(InvalidAudience::Text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn audiences_are_few_and_short() {
        let audience = |names: &[&str]| {
            Audience::try_from(names.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        let both = audience(&["b", "a", "b"]).unwrap();
        assert_eq!(
            (both.to_vec(), both.first()),
            (vec!["a".into(), "b".into()], "a")
        );
        assert_eq!(Ok(both), audience(&["a", "b"]));
        let long = "x".repeat(MAX_BYTES + 1);
        assert!(audience(&[&long[1..]; MAX_AUDIENCES]).is_ok());
        for (bad, expected) in [
            (&[][..], InvalidAudience::None),
            (&["a"; MAX_AUDIENCES + 1], InvalidAudience::TooMany(9)),
            (&["a", ""], InvalidAudience::Text),
            (&["a\n"], InvalidAudience::Text),
            (&[&long], InvalidAudience::Text),
        ] {
            assert_eq!(audience(bad), Err(expected), "{bad:?}");
        }
    }
}
