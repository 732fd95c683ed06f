//! SPIFFE IDs: those of Kubernetes service accounts, and those with any other path.

use std::{fmt, str::FromStr, sync::Arc};

/// Maximum length of a SPIFFE ID that implementations must support, in bytes (SPIFFE-ID §2.3).
const MAX_BYTES: usize = 2048;
/// Maximum length of a trust domain, in bytes (SPIFFE-ID §2.1).
const MAX_TRUST_DOMAIN_BYTES: usize = 255;

/// A trust domain: the name of the authority behind a set of identities (SPIFFE-ID §2.1), and its aliases.
///
/// An alias is another name of the same trust domain, such as the one that it had before (`trustDomainAliases` in Istio's
/// mesh configuration). An identity under an alias is the same identity.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain {
    name: Arc<str>,
    aliases: Arc<[Self]>,
}

impl Default for TrustDomain {
    /// Returns `cluster.local`, the usual default in Kubernetes.
    fn default() -> Self {
        Self::named("cluster.local")
    }
}

/// The identity of a service account: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
///
/// A value of this type is always well formed. Cloning is cheap.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    uri: Arc<str>,
    trust_domain_end: u16,
    namespace_end: u16,
}

/// A SPIFFE ID with any path, such as that of a workload of a foreign trust domain (SPIFFE-ID §2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpiffeId {
    uri: String,
    trust_domain: TrustDomain,
}

/// Reason why a text is not a SPIFFE ID, or not that of a service account.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidIdentity {
    /// The text is longer than 2048 bytes.
    #[error("longer than {MAX_BYTES} bytes")]
    TooLong,
    /// The scheme is not `spiffe`, in lower case.
    #[error("does not start with spiffe://")]
    Scheme,
    /// The trust domain is empty, too long, or has a character outside `a-z0-9.-_`.
    #[error("trust domain {0:?} is not 1 to 255 of a-z, 0-9, '.', '-', '_'")]
    TrustDomain(String),
    /// The path does not have the form `/ns/<namespace>/sa/<service account>`.
    #[error("path is not /ns/<namespace>/sa/<service account>")]
    Path,
    /// The path is missing, or has an empty segment, `.` or `..`, or a forbidden character (SPIFFE-ID §2.2).
    #[error("path does not consist of segments of A-Z, a-z, 0-9, '.', '-', '_'")]
    Segments,
    /// The namespace or service account is not a valid Kubernetes name.
    #[error("{0:?} is not a Kubernetes name")]
    Name(String),
}

impl TrustDomain {
    fn named(name: &str) -> Self {
        Self {
            name: name.into(),
            aliases: Arc::default(),
        }
    }

    /// Returns the trust domain with these other names.
    pub fn with_aliases(self, aliases: impl IntoIterator<Item = Self>) -> Self {
        Self {
            aliases: aliases.into_iter().collect(),
            ..self
        }
    }

    /// Returns the name, without the scheme.
    pub fn as_str(&self) -> &str {
        &self.name
    }

    /// Returns the aliases.
    pub fn aliases(&self) -> &[Self] {
        &self.aliases
    }

    /// Reports whether `name` is the trust domain's own name or an alias.
    pub fn is_named(&self, name: &str) -> bool {
        name == self.as_str() || self.aliases.iter().any(|alias| name == alias.as_str())
    }

    /// Returns `identity` under the trust domain's own name. `None` if it is of another trust domain.
    pub fn resolve(&self, identity: &Identity) -> Option<Identity> {
        let name = identity.trust_domain();
        if name == self.as_str() {
            return Some(identity.clone());
        }
        if !self.is_named(name) {
            return None;
        }
        let own = self.identity(identity.namespace(), identity.service_account());
        // The same names are valid under a longer trust domain, too, unless the whole is too long.
        own.ok()
    }

    /// Returns the identity of a service account in this trust domain.
    ///
    /// Fails if a name is not a valid Kubernetes name.
    pub fn identity(
        &self,
        namespace: &str,
        service_account: &str,
    ) -> Result<Identity, InvalidIdentity> {
        format!("spiffe://{self}/ns/{namespace}/sa/{service_account}").parse()
    }
}

impl FromStr for TrustDomain {
    type Err = InvalidIdentity;

    fn from_str(name: &str) -> Result<Self, InvalidIdentity> {
        let valid = !name.is_empty()
            && name.len() <= MAX_TRUST_DOMAIN_BYTES
            && name
                .bytes()
                .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_'));
        if valid {
            Ok(Self::named(name))
        } else {
            Err(InvalidIdentity::TrustDomain(
                name.chars().take(64).collect(),
            ))
        }
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

const SCHEME: &str = "spiffe://";

impl Identity {
    /// Returns the whole SPIFFE ID.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// Returns the trust domain's name.
    pub fn trust_domain(&self) -> &str {
        &self.uri[SCHEME.len()..usize::from(self.trust_domain_end)]
    }

    /// Returns the service account's namespace.
    pub fn namespace(&self) -> &str {
        &self.uri
            [usize::from(self.trust_domain_end) + "/ns/".len()..usize::from(self.namespace_end)]
    }

    /// Returns the service account's name.
    pub fn service_account(&self) -> &str {
        &self.uri[usize::from(self.namespace_end) + "/sa/".len()..]
    }
}

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(uri: &str) -> Result<Self, InvalidIdentity> {
        if uri.len() > MAX_BYTES {
            return Err(InvalidIdentity::TooLong);
        }
        let rest = uri.strip_prefix(SCHEME).ok_or(InvalidIdentity::Scheme)?;
        let (trust_domain, path) = rest.split_once('/').ok_or(InvalidIdentity::Path)?;
        trust_domain.parse::<TrustDomain>()?;
        let (namespace, account) = path
            .strip_prefix("ns/")
            .and_then(|path| path.split_once("/sa/"))
            .ok_or(InvalidIdentity::Path)?;
        if namespace.contains('/') || account.contains('/') {
            return Err(InvalidIdentity::Path);
        }
        for (name, longest, dots) in [(namespace, 63, false), (account, 253, true)] {
            if !kubernetes_name(name, longest, dots) {
                return Err(InvalidIdentity::Name(name.chars().take(64).collect()));
            }
        }
        let trust_domain_end = SCHEME.len() + trust_domain.len();
        Ok(Self {
            uri: uri.into(),
            // Both fit in 16 bits, because the whole ID is at most 2048 bytes.
            trust_domain_end: trust_domain_end as u16,
            namespace_end: (trust_domain_end + "/ns/".len() + namespace.len()) as u16,
        })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl SpiffeId {
    /// Returns the ID with this path of one or more segments, such as `/a/b`, in `trust_domain`.
    pub fn new(trust_domain: &TrustDomain, path: &str) -> Result<Self, InvalidIdentity> {
        format!("{SCHEME}{trust_domain}{path}").parse()
    }

    /// Returns the whole ID.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// Returns the trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidIdentity;

    fn from_str(uri: &str) -> Result<Self, InvalidIdentity> {
        if uri.len() > MAX_BYTES {
            return Err(InvalidIdentity::TooLong);
        }
        let rest = uri.strip_prefix(SCHEME).ok_or(InvalidIdentity::Scheme)?;
        let (trust_domain, path) = rest.split_once('/').ok_or(InvalidIdentity::Segments)?;
        let is_segment = |segment: &str| {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
            !matches!(segment, "" | "." | "..") && segment.bytes().all(allowed)
        };
        if !path.split('/').all(is_segment) {
            return Err(InvalidIdentity::Segments);
        }
        Ok(Self {
            trust_domain: trust_domain.parse()?,
            uri: uri.to_owned(),
        })
    }
}

/// Reports whether `name` is an RFC 1123 label, or, if `dots` is true, an RFC 1123 subdomain.
fn kubernetes_name(name: &str, longest: usize, dots: bool) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    name.len() <= longest
        && name.split('.').enumerate().all(|(index, label)| {
            (index == 0 || dots)
                && label.bytes().next().is_some_and(alphanumeric)
                && label.bytes().last().is_some_and(alphanumeric)
                && label.bytes().all(|b| alphanumeric(b) || b == b'-')
        })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parts_of_an_identity() {
        let id: Identity = "spiffe://cluster.local/ns/default/sa/web.v1"
            .parse()
            .unwrap();
        assert_eq!(id.trust_domain(), "cluster.local");
        assert_eq!(id.namespace(), "default");
        assert_eq!(id.service_account(), "web.v1");
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        assert_eq!(domain.identity("default", "web.v1").unwrap(), id);
    }

    #[test]
    fn an_identity_under_an_alias_is_the_same_identity() {
        let domain = |name: &str| name.parse::<TrustDomain>().unwrap();
        let own =
            domain("new.example").with_aliases([domain("old.example"), domain("older.example")]);
        let resolved = |name: &str| {
            let identity = format!("spiffe://{name}/ns/shop/sa/web").parse().unwrap();
            own.resolve(&identity).map(|identity| identity.to_string())
        };
        for name in ["new.example", "old.example", "older.example"] {
            let expected = "spiffe://new.example/ns/shop/sa/web";
            assert_eq!(resolved(name).as_deref(), Some(expected), "{name}");
        }
        for name in [
            "other.example",
            "old.example.org",
            "example",
            "cluster.local",
        ] {
            assert_eq!(resolved(name), None, "{name}");
        }
    }

    #[test]
    fn rejects_ids_of_no_service_account() {
        use InvalidIdentity as E;
        for (uri, expected) in [
            ("", E::Scheme),
            ("SPIFFE://a/ns/b/sa/c", E::Scheme),
            ("https://a/ns/b/sa/c", E::Scheme),
            ("spiffe://a", E::Path),
            ("spiffe:///ns/b/sa/c", E::TrustDomain(String::new())),
            ("spiffe://A/ns/b/sa/c", E::TrustDomain("A".into())),
            ("spiffe://a:80/ns/b/sa/c", E::TrustDomain("a:80".into())),
            ("spiffe://a/ns/b", E::Path),
            ("spiffe://a/ns/b/sa/c/", E::Path),
            ("spiffe://a/ns/b/x/sa/c", E::Path),
            ("spiffe://a/ns/b/sa/c?d", E::Name("c?d".into())),
            ("spiffe://a/ns/b/sa/c#d", E::Name("c#d".into())),
            ("spiffe://a/ns/b/sa/%63", E::Name("%63".into())),
            ("spiffe://a/ns//sa/c", E::Name(String::new())),
            ("spiffe://a/ns/b/sa/", E::Name(String::new())),
            ("spiffe://a/ns/b.c/sa/d", E::Name("b.c".into())),
            ("spiffe://a/ns/-b/sa/d", E::Name("-b".into())),
            ("spiffe://a/ns/b/sa/..", E::Name("..".into())),
        ] {
            assert_eq!(uri.parse::<Identity>(), Err(expected), "{uri}");
        }
        let long = format!("spiffe://a/ns/b/sa/{}", "c".repeat(2048));
        assert_eq!(long.parse::<Identity>(), Err(E::TooLong));
    }

    #[test]
    fn ids_with_any_path() {
        for good in ["spiffe://example.org/spire/server", "spiffe://a/B_c.d-1"] {
            let id: SpiffeId = good.parse().unwrap();
            assert_eq!(id.as_str(), good);
        }
        for bad in [
            "spiffe://example.org",
            "spiffe://example.org/",
            "spiffe://example.org/a/",
            "spiffe://example.org//a",
            "spiffe://example.org/..",
            "spiffe://example.org/a%20",
            "spiffe://Example.org/a",
            "https://example.org/a",
            "spiffe:///a",
            "spiffe://user@example.org/a",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in "(spiffe://)?[a-z./]{0,12}(/ns/)?[a-z0-9./-]{0,8}(/sa/)?\\PC{0,8}") {
            let any = text.parse::<SpiffeId>();
            if let Ok(id) = text.parse::<Identity>() {
                let domain = any.unwrap().trust_domain().clone();
                prop_assert_eq!(domain.as_str(), id.trust_domain());
                prop_assert_eq!(id.as_str(), &text);
                let whole = format!(
                    "spiffe://{}/ns/{}/sa/{}", id.trust_domain(), id.namespace(), id.service_account()
                );
                prop_assert_eq!(whole, text);
            }
        }
    }
}
