//! How rules refer to callers and addresses.

use std::{fmt, net::IpAddr};

use ipnet::{IpNet, Ipv4Net};

use super::read::quoted;

/// A string pattern: exact, prefix, suffix or presence.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Pattern {
    /// `abc`.
    Exact(Box<str>),
    /// `abc*`. Also matches `abc`.
    Prefix(Box<str>),
    /// `*abc`. Also matches `abc`.
    Suffix(Box<str>),
    /// `*`. Matches every non-empty string, so it requires an identity.
    Present,
}

impl Pattern {
    /// Parses a pattern of principals: SPIFFE IDs without the scheme.
    pub(super) fn principal(text: &str) -> Result<Self, String> {
        if text.starts_with("spiffe://") {
            return Err(format!(
                "{}: principals are written without spiffe://",
                quoted(text)
            ));
        }
        Self::new(text, "a principal", |b| {
            b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'/')
        })
    }

    /// Parses a pattern of namespace names.
    pub(super) fn namespace(text: &str) -> Result<Self, String> {
        Self::new(text, "a namespace", |b| {
            b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'
        })
    }

    fn new(text: &str, what: &str, allowed: impl Fn(u8) -> bool) -> Result<Self, String> {
        let (text, pattern): (&str, fn(Box<str>) -> Self) = match text {
            "" => return Err("must not be empty".into()),
            "*" => return Ok(Self::Present),
            _ => match (text.strip_prefix('*'), text.strip_suffix('*')) {
                (Some(suffix), _) => (suffix, Self::Suffix),
                (None, Some(prefix)) => (prefix, Self::Prefix),
                (None, None) => (text, Self::Exact),
            },
        };
        if text.contains('*') {
            return Err(format!("{}: * is a wildcard at one end only", quoted(text)));
        }
        if !text.bytes().all(allowed) {
            return Err(format!(
                "{} is not {what}; there are no regular expressions here, only a * at one end",
                quoted(text)
            ));
        }
        Ok(pattern(text.into()))
    }

    /// Reports whether `text` matches the pattern.
    pub fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => text == &**exact,
            Self::Prefix(prefix) => text.starts_with(&**prefix),
            Self::Suffix(suffix) => text.ends_with(&**suffix),
            Self::Present => !text.is_empty(),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(text) => f.write_str(text),
            Self::Prefix(text) => write!(f, "{text}*"),
            Self::Suffix(text) => write!(f, "*{text}"),
            Self::Present => f.write_str("*"),
        }
    }
}

/// A service account in any trust domain.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Account(Box<str>);

impl Account {
    /// Parses `namespace/name`, or a name in the policy's own `namespace`. Wildcards are not allowed.
    pub fn new(text: &str, namespace: &str) -> Result<Self, String> {
        let (namespace, name) = text.split_once('/').unwrap_or((namespace, text));
        let named = |part: &str, dot: bool| {
            !part.is_empty()
                && part.bytes().all(|b| {
                    b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || dot && b == b'.'
                })
        };
        if text.len() > MAX_ACCOUNT_BYTES || !named(namespace, false) || !named(name, true) {
            return Err(format!(
                "{} is not a service account, as name or namespace/name, without *",
                quoted(text)
            ));
        }
        Ok(Self(format!("/ns/{namespace}/sa/{name}").into()))
    }

    /// Returns the path of the account's SPIFFE ID: `/ns/<namespace>/sa/<name>`.
    pub fn path(&self) -> &str {
        &self.0
    }
}

/// Maximum length of a service account in a policy, in bytes: 63 for the namespace, a slash, 253 for the name, and
/// slack.
const MAX_ACCOUNT_BYTES: usize = 320;

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Parses an address or a CIDR block. IPv4-mapped addresses become IPv4, and bits outside the prefix are cleared.
pub(super) fn block(text: &str) -> Result<IpNet, String> {
    let block = if text.contains('/') {
        let block: IpNet = text
            .parse()
            .map_err(|_| format!("{} is not a CIDR", quoted(text)))?;
        block
    } else {
        let address: IpAddr = text
            .parse()
            .map_err(|_| format!("{} is not an IP address", quoted(text)))?;
        IpNet::from(address)
    };
    if let IpNet::V6(v6) = block
        && let Some(address) = v6.addr().to_ipv4_mapped()
        && let Some(length) = v6.prefix_len().checked_sub(96)
        && let Ok(v4) = Ipv4Net::new(address, length)
    {
        return Ok(IpNet::V4(v4.trunc()));
    }
    Ok(block.trunc())
}

/// Parses a port, written as a decimal string.
pub(super) fn port(text: &str) -> Result<u16, String> {
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    text.parse()
        .ok()
        .filter(|_| digits)
        .ok_or_else(|| format!("{} is not a port, 0 to 65535", quoted(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        let pattern = |text| Pattern::principal(text).unwrap();
        assert_eq!(pattern("*"), Pattern::Present);
        assert_eq!(pattern("a/b*"), Pattern::Prefix("a/b".into()));
        assert_eq!(pattern("*/b"), Pattern::Suffix("/b".into()));
        assert!(pattern("abc*").matches("abc") && pattern("abc*").matches("abcd"));
        assert!(pattern("*abc").matches("abc") && pattern("*abc").matches("xabc"));
        assert!(!pattern("abc").matches("abcd") && !pattern("*").matches(""));
        for bad in [
            "",
            "a*b",
            "*a*",
            "**",
            "td/ns/(a|b)/sa/.+",
            "a b",
            "spiffe://td/ns/a/sa/b",
        ] {
            assert!(Pattern::principal(bad).is_err(), "{bad}");
        }
        for bad in ["Shop", "a.b", "a/b", "^a$", "a-*-b"] {
            assert!(Pattern::namespace(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn blocks_and_ports() {
        let block = |text| block(text).map(|block| block.to_string());
        assert_eq!(block("10.1.2.3").unwrap(), "10.1.2.3/32");
        assert_eq!(block("10.1.2.3/8").unwrap(), "10.0.0.0/8");
        assert_eq!(block("::ffff:10.1.2.3").unwrap(), "10.1.2.3/32");
        assert_eq!(block("::ffff:10.1.2.3/104").unwrap(), "10.0.0.0/8");
        assert_eq!(block("fd00::1/64").unwrap(), "fd00::/64");
        assert_eq!(
            block("10.0.0.0/33").unwrap_err(),
            "\"10.0.0.0/33\" is not a CIDR"
        );
        for bad in ["", "10.0.0", "10.0.0.0/", "10.0.0.0/08x", "*", "web"] {
            assert!(block(bad).is_err(), "{bad}");
        }
        assert_eq!(port("65535"), Ok(65535));
        for bad in ["", "65536", "+80", "-1", "80-90", "http", "*"] {
            assert!(port(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn accounts() {
        let path = |text| Account::new(text, "shop").map(|account| account.path().to_owned());
        assert_eq!(path("web").unwrap(), "/ns/shop/sa/web");
        assert_eq!(path("other/web.v1").unwrap(), "/ns/other/sa/web.v1");
        for bad in ["", "*", "web*", "a/*", "/a", "a/", "a/b/c", "A", "a.b/c"] {
            assert!(path(bad).is_err(), "{bad}");
        }
    }
}
