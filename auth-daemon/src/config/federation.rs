//! The `federation` list: foreign trust domains, and where their bundles come from.

use std::{collections::BTreeSet, fmt, path::PathBuf, str::FromStr};

use auth_federation::{Endpoint, Profile, Url};
use auth_mesh::{SpiffeId, TrustDomain};
use auth_support::config::{Section, absolute};

/// Name that stands for the mesh's own trust domain in policies.
const OWN_IN_POLICIES: &str = "cluster.local";
const ENDPOINT_FIELDS: [&str; 4] = ["url", "profile", "rootFile", "spiffeId"];

/// The foreign trust domains that the mesh trusts for their own names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Federation(Vec<ForeignDomain>);

/// A foreign trust domain, and where its bundle comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignDomain {
    /// The trust domain. Neither the mesh's own nor an alias of it, and in no other entry.
    pub trust_domain: TrustDomain,
    /// Where its bundle comes from.
    pub source: BundleSource,
}

/// Where a bundle comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BundleSource {
    /// A file, as a SPIFFE bundle document or as PEM. Read again when it changes; without it, nothing is trusted.
    File(PathBuf),
    /// An endpoint.
    Endpoint {
        /// The endpoint.
        endpoint: Endpoint,
        /// A file with the bundle that is trusted until the endpoint has answered once.
        first: Option<PathBuf>,
    },
}

impl Federation {
    /// Takes the list from `root`. `own` is the mesh's trust domain.
    pub(super) fn read(root: &mut Section, own: &TrustDomain, errors: &mut Vec<String>) -> Self {
        let mut domains: Vec<ForeignDomain> = Vec::new();
        let mut names = BTreeSet::new();
        for (index, mut entry) in root.sections("federation", errors).into_iter().enumerate() {
            let trust_domain = entry.required("trustDomain", errors, |name| {
                let domain = TrustDomain::from_str(name).map_err(|error| error.to_string())?;
                if own.is_named(name) {
                    return Err("is the mesh's own trust domain, or an alias of it".into());
                }
                if name == OWN_IN_POLICIES {
                    return Err(
                        "stands for the mesh's own trust domain in policies; the other mesh needs a name of its own"
                            .to_owned(),
                    );
                }
                match names.insert(name.to_owned()) {
                    true => Ok(domain),
                    false => Err("is in another entry, too".into()),
                }
            });
            let source = BundleSource::read(index, &mut entry, trust_domain.as_ref(), errors);
            entry.refuse_the_rest(errors);
            if let (Some(trust_domain), Some(source)) = (trust_domain, source) {
                domains.push(ForeignDomain {
                    trust_domain,
                    source,
                });
            }
        }
        let federation = Self(domains);
        federation.check_endpoints(own, errors);
        federation
    }

    /// Checks that the bundle that verifies an `https_spiffe` endpoint comes from somewhere: from the CA, from another entry,
    /// or from a file.
    fn check_endpoints(&self, own: &TrustDomain, errors: &mut Vec<String>) {
        for (index, domain) in self.0.iter().enumerate() {
            let Some(id) = domain.source.endpoint_id() else {
                continue;
            };
            let server = id.trust_domain();
            if own.is_named(server.as_str()) || domain.trust_domain == *server {
                continue;
            }
            let mut seen = BTreeSet::from([domain.trust_domain.as_str()]);
            let mut next = server.as_str();
            let field = format!("federation[{index}].bundleEndpoint.spiffeId");
            // The chain of endpoints must end in one that another kind of trust verifies (SPIFFE Federation §7.6).
            while !own.is_named(next) {
                if !seen.insert(next) {
                    errors.push(format!(
                        "{field}: endpoints verify each other in a circle; give one of them another profile or a file"
                    ));
                    break;
                }
                let found = self
                    .0
                    .iter()
                    .find(|domain| domain.trust_domain.as_str() == next);
                let Some(found) = found else {
                    errors.push(format!(
                        "{field}: is of trust domain {next}, which verifies it and needs an entry of its own"
                    ));
                    break;
                };
                match found.source.endpoint_id() {
                    Some(id) if id.trust_domain() != &found.trust_domain => {
                        next = id.trust_domain().as_str();
                    }
                    _ => break,
                }
            }
        }
    }

    /// Creates a list. The trust domains must differ.
    #[cfg(test)]
    pub(crate) fn new(domains: Vec<ForeignDomain>) -> Self {
        Self(domains)
    }

    /// The foreign trust domains.
    pub fn domains(&self) -> &[ForeignDomain] {
        &self.0
    }
}

impl BundleSource {
    fn read(
        index: usize,
        entry: &mut Section,
        trust_domain: Option<&TrustDomain>,
        errors: &mut Vec<String>,
    ) -> Option<Self> {
        let has_file = entry.has("bundleFile");
        let file = entry.parsed("bundleFile", errors, absolute);
        if !entry.has("bundleEndpoint") {
            if !has_file {
                errors.push(format!(
                    "federation[{index}]: has neither bundleEndpoint nor bundleFile: where does the bundle come from?"
                ));
            }
            return file.map(Self::File);
        }
        let mut section = entry.section("bundleEndpoint", errors);
        let url = section.required("url", errors, Url::from_str);
        let profile = section.required("profile", errors, |profile| match profile {
            "https_web" => Ok(false),
            "https_spiffe" => Ok(true),
            _ => Err("is neither https_web nor https_spiffe"),
        });
        let field = |name: &str| format!("federation[{index}].bundleEndpoint.{name}");
        let profile = match profile {
            None => {
                ENDPOINT_FIELDS.iter().for_each(|field| section.skip(field));
                None
            }
            Some(false) => Some(Profile::Web {
                root_file: section.parsed("rootFile", errors, absolute),
            }),
            Some(true) => {
                let id = section.required("spiffeId", errors, SpiffeId::from_str);
                let serves_itself = id
                    .as_ref()
                    .is_some_and(|id| Some(id.trust_domain()) == trust_domain);
                if serves_itself && file.is_none() {
                    errors.push(format!(
                        "{}: is of the entry's own trust domain, so bundleFile is needed to verify it the first time",
                        field("spiffeId")
                    ));
                }
                id.map(|id| Profile::Spiffe { id })
            }
        };
        section.refuse_the_rest(errors);
        Some(Self::Endpoint {
            endpoint: Endpoint {
                url: url?,
                profile: profile?,
            },
            first: file,
        })
    }

    /// The SPIFFE ID that authenticates the endpoint, if it is one of `https_spiffe`.
    fn endpoint_id(&self) -> Option<&SpiffeId> {
        match self {
            Self::Endpoint {
                endpoint:
                    Endpoint {
                        profile: Profile::Spiffe { id },
                        ..
                    },
                ..
            } => Some(id),
            _ => None,
        }
    }
}

impl fmt::Display for BundleSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file) => file.display().fmt(f),
            Self::Endpoint { endpoint, .. } => endpoint.url.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Federation, Vec<String>> {
        let mut errors = Vec::new();
        let mut root = Section::of_yaml(text, &mut errors)?;
        let own: TrustDomain = "own.example".parse().unwrap();
        let own = own.with_aliases(["old.example".parse().unwrap()]);
        let federation = Federation::read(&mut root, &own, &mut errors);
        root.refuse_the_rest(&mut errors);
        match errors.is_empty() {
            true => Ok(federation),
            false => Err(errors),
        }
    }

    #[test]
    fn reads_all_sources() {
        assert_eq!(read("{}"), Ok(Federation::default()));
        let federation = read(
            "federation:\n\
             - {trustDomain: a.example, bundleFile: /a.json}\n\
             - trustDomain: b.example\n\
             \x20 bundleEndpoint: {url: 'https://b.example/', profile: https_web, rootFile: /web.pem}\n\
             - trustDomain: c.example\n\
             \x20 bundleEndpoint: {url: 'https://c.example/', profile: https_spiffe, spiffeId: 'spiffe://c.example/x'}\n\
             \x20 bundleFile: /c.json\n\
             - trustDomain: d.example\n\
             \x20 bundleEndpoint: {url: 'https://d.example/', profile: https_spiffe, spiffeId: 'spiffe://c.example/x'}\n\
             - trustDomain: e.example\n\
             \x20 bundleEndpoint: {url: 'https://e.example/', profile: https_spiffe, spiffeId: 'spiffe://old.example/x'}\n",
        )
        .unwrap();
        let [a, b, c, d, e] = federation.domains() else {
            panic!("{federation:?}");
        };
        assert_eq!(a.trust_domain.as_str(), "a.example");
        assert_eq!(a.source, BundleSource::File("/a.json".into()));
        let BundleSource::Endpoint { endpoint, first } = &b.source else {
            panic!("{b:?}");
        };
        let root_file = Some("/web.pem".into());
        assert_eq!(
            (&endpoint.profile, first),
            (&Profile::Web { root_file }, &None)
        );
        for (domain, id) in [
            (c, "spiffe://c.example/x"),
            (d, "spiffe://c.example/x"),
            (e, "spiffe://old.example/x"),
        ] {
            assert_eq!(domain.source.endpoint_id().unwrap().as_str(), id);
        }
    }

    #[test]
    fn documented_lists_are_valid() {
        let page = include_str!("../../../docs/FEDERATION.md");
        let lists = page.split("```yaml\nfederation:").skip(1);
        let names = lists.map(|rest| {
            let (list, _) = rest.split_once("```").unwrap();
            let federation = read(&format!("federation:{list}")).unwrap();
            let names = federation.domains().iter();
            let names = names.map(|domain| domain.trust_domain.to_string());
            names.collect::<Vec<_>>().join(", ")
        });
        assert_eq!(
            names.collect::<Vec<_>>(),
            ["far.example, partner.example, lab.example", "spire.example"]
        );
    }

    #[test]
    fn names_every_error() {
        let spiffe = |domain: &str, server: &str| {
            format!(
                "{{trustDomain: {domain}, bundleEndpoint: {{url: 'https://x/', profile: https_spiffe, \
                 spiffeId: 'spiffe://{server}/x'}}}}"
            )
        };
        for (entries, expected) in [
            ("x".to_owned(), "federation[0]: is not a mapping"),
            ("{bundleFile: /a}".into(), "federation[0].trustDomain: is missing"),
            ("{trustDomain: A, bundleFile: /a}".into(), "federation[0].trustDomain: \"A\""),
            ("{trustDomain: own.example, bundleFile: /a}".into(), "the mesh's own trust domain"),
            ("{trustDomain: old.example, bundleFile: /a}".into(), "an alias of it"),
            ("{trustDomain: cluster.local, bundleFile: /a}".into(), "a name of its own"),
            (
                "{trustDomain: a, bundleFile: /a}, {trustDomain: a, bundleFile: /b}".into(),
                "federation[1].trustDomain: \"a\": is in another entry",
            ),
            ("{trustDomain: a}".into(), "federation[0]: has neither bundleEndpoint nor bundleFile"),
            ("{trustDomain: a, bundleFile: a}".into(), "federation[0].bundleFile: \"a\""),
            ("{trustDomain: a, bundleFile: /a, x: 1}".into(), "federation[0].x: there is no such field"),
            (
                "{trustDomain: a, bundleEndpoint: {}}".into(),
                "federation[0].bundleEndpoint.url: is missing",
            ),
            (
                "{trustDomain: a, bundleEndpoint: {url: 'http://x/', profile: https_web}}".into(),
                "federation[0].bundleEndpoint.url: \"http://x/\": is not an https URL",
            ),
            (
                "{trustDomain: a, bundleEndpoint: {url: 'https://x/', profile: web}}".into(),
                "federation[0].bundleEndpoint.profile: \"web\"",
            ),
            (
                "{trustDomain: a, bundleEndpoint: {url: 'https://x/', profile: https_web, spiffeId: 'spiffe://a/x'}}"
                    .into(),
                "federation[0].bundleEndpoint.spiffeId: there is no such field",
            ),
            (
                "{trustDomain: a, bundleEndpoint: {url: 'https://x/', profile: https_spiffe}}".into(),
                "federation[0].bundleEndpoint.spiffeId: is missing",
            ),
            (spiffe("a", "a"), "bundleFile is needed"),
            (spiffe("a", "b"), "is of trust domain b, which verifies it and needs an entry"),
            (format!("{}, {}", spiffe("a", "b"), spiffe("b", "a")), "in a circle"),
        ] {
            let errors = read(&format!("federation: [{entries}]")).unwrap_err();
            let found = errors.iter().any(|error| error.contains(expected));
            assert!(found, "{entries}: {errors:?}");
        }
    }
}
