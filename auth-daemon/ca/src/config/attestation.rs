//! How callers are identified: the section `attestation`.

use std::{collections::HashSet, path::PathBuf};

use auth_mesh::{ObjectName, TrustDomain};
use auth_support::config::{Section, absolute, node_name};
use tonic::codegen::http::Uri;

/// The ways to identify callers: at least one of `tokens`, `jwks` and `kubernetes`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attestation {
    /// Nodes with a token of their own.
    pub tokens: Vec<NodeToken>,
    /// An OIDC issuer whose service account tokens are accepted.
    pub jwks: Option<JwksAttestation>,
    /// An OIDC issuer whose tokens identify people.
    pub people: Option<PeopleAttestation>,
    /// Whether the API server reviews tokens.
    pub kubernetes: Option<KubernetesAttestation>,
}

/// A node with a token of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeToken {
    /// The node's name.
    pub node: String,
    /// File with the token: at least 32 characters. Read again when it changes.
    pub token_file: PathBuf,
}

/// An OIDC issuer whose tokens are accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OidcIssuer {
    /// Must be in the token's `iss`, exactly.
    pub issuer: String,
    /// Must be in the token's `aud`.
    pub audience: String,
    /// Where the issuer's keys come from.
    pub source: JwksSource,
}

/// Service account tokens of an OIDC issuer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JwksAttestation {
    /// The issuer.
    pub issuer: OidcIssuer,
    /// The service account of the node daemons.
    pub node_service_account: Option<ObjectName>,
}

/// Tokens of people, who act as service accounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeopleAttestation {
    /// The issuer.
    pub issuer: OidcIssuer,
    /// The claim with the person's name. Defaults to `sub`.
    pub name_claim: String,
    /// The claim with the person's groups. Defaults to `groups`.
    pub groups_claim: String,
    /// Who may act as which account: at least one.
    pub accounts: Vec<PersonAccount>,
}

/// Who may act as one account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PersonAccount {
    /// The account.
    pub account: ObjectName,
    /// People with one of these names.
    pub names: Vec<String>,
    /// People in one of these groups.
    pub groups: Vec<String>,
}

/// Where an issuer's keys are (RFC 7517 §5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JwksSource {
    /// A file, read again when it changes.
    File(PathBuf),
    /// A server.
    Url {
        /// `https`, or `http` on the loopback.
        url: String,
        /// PEM file with the roots to verify the server with, instead of the system's.
        root_file: Option<PathBuf>,
    },
}

/// Tokens that the API server reviews (TokenReview).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubernetesAttestation {
    /// The audience that a token must be issued for.
    pub audience: String,
    /// The service account of the node daemons.
    pub node_service_account: Option<ObjectName>,
    /// Whether people may act as service accounts whose tokens they may create. Defaults to no.
    pub people: bool,
}

impl Attestation {
    /// Takes the section from `top`. Returns `None` if a part of it cannot be read.
    pub(super) fn read(top: &mut Section, errors: &mut Vec<String>) -> Option<Self> {
        let mut section = top.section("attestation", errors);
        let tokens = tokens(&mut section, errors);
        let jwks = section
            .has("jwks")
            .then(|| jwks(section.section("jwks", errors), errors));
        let kubernetes = section
            .has("kubernetes")
            .then(|| kubernetes(section.section("kubernetes", errors), errors));
        let people = section
            .has("people")
            .then(|| people(section.section("people", errors), errors));
        section.refuse_the_rest(errors);
        if let (Some(Some(jwks)), Some(Some(people))) = (&jwks, &people)
            && jwks.issuer.issuer == people.issuer.issuer
        {
            errors.push(
                "attestation.people.issuer: is that of attestation.jwks, too: people and service accounts need an \
                 issuer each"
                    .into(),
            );
        }
        Some(Self {
            tokens,
            jwks: all_or_none(jwks)?,
            people: all_or_none(people)?,
            kubernetes: all_or_none(kubernetes)?,
        })
    }
}

/// `None` if a section exists but could not be read.
fn all_or_none<T>(section: Option<Option<T>>) -> Option<Option<T>> {
    match section {
        None => Some(None),
        Some(read) => read.map(Some),
    }
}

fn tokens(attestation: &mut Section, errors: &mut Vec<String>) -> Vec<NodeToken> {
    let mut tokens = Vec::new();
    let mut nodes = HashSet::new();
    for (index, mut section) in attestation
        .sections("tokens", errors)
        .into_iter()
        .enumerate()
    {
        let node = section.required("node", errors, node_name);
        let token_file = section.required("tokenFile", errors, absolute);
        section.refuse_the_rest(errors);
        let (Some(node), Some(token_file)) = (node, token_file) else {
            continue;
        };
        if !nodes.insert(node.clone()) {
            errors.push(format!(
                "attestation.tokens[{index}].node: {node:?} has a token already"
            ));
        }
        tokens.push(NodeToken { node, token_file });
    }
    tokens
}

fn jwks(mut section: Section, errors: &mut Vec<String>) -> Option<JwksAttestation> {
    let issuer = oidc_issuer("attestation.jwks", &mut section, errors);
    let node_service_account = section.parsed("nodeServiceAccount", errors, service_account);
    section.refuse_the_rest(errors);
    Some(JwksAttestation {
        issuer: issuer?,
        node_service_account,
    })
}

fn people(mut section: Section, errors: &mut Vec<String>) -> Option<PeopleAttestation> {
    let issuer = oidc_issuer("attestation.people", &mut section, errors);
    let name_claim = section.parsed("nameClaim", errors, not_empty);
    let groups_claim = section.parsed("groupsClaim", errors, not_empty);
    let mut accounts = Vec::new();
    for (index, mut one) in section.sections("accounts", errors).into_iter().enumerate() {
        let account = one.required("account", errors, service_account);
        let names = one.list("names", errors, not_empty).unwrap_or_default();
        let groups = one.list("groups", errors, not_empty).unwrap_or_default();
        one.refuse_the_rest(errors);
        if names.is_empty() && groups.is_empty() {
            errors.push(format!(
                "attestation.people.accounts[{index}]: has neither names nor groups: nobody may act as the account"
            ));
        }
        accounts.extend(account.map(|account| PersonAccount {
            account,
            names,
            groups,
        }));
    }
    if accounts.is_empty() {
        errors.push(
            "attestation.people.accounts: is missing: it says who may act as which account".into(),
        );
    }
    section.refuse_the_rest(errors);
    Some(PeopleAttestation {
        issuer: issuer?,
        name_claim: name_claim.unwrap_or_else(|| "sub".into()),
        groups_claim: groups_claim.unwrap_or_else(|| "groups".into()),
        accounts,
    })
}

/// Reads the fields of an issuer in the section at `path`.
fn oidc_issuer(path: &str, section: &mut Section, errors: &mut Vec<String>) -> Option<OidcIssuer> {
    let issuer = section.required("issuer", errors, not_empty);
    let audience = section.required("audience", errors, not_empty);
    let root_file = section.parsed("rootFile", errors, absolute);
    let source = match (section.has("jwksFile"), section.has("jwksUrl")) {
        (true, false) => section
            .parsed("jwksFile", errors, absolute)
            .map(JwksSource::File),
        (false, true) => section
            .parsed("jwksUrl", errors, jwks_url)
            .map(|url| JwksSource::Url {
                url,
                root_file: root_file.clone(),
            }),
        _ => {
            section.skip("jwksFile");
            section.skip("jwksUrl");
            errors.push(format!(
                "{path}: needs one of jwksFile and jwksUrl: the issuer's keys"
            ));
            None
        }
    };
    if root_file.is_some() && !matches!(source, Some(JwksSource::Url { .. }) | None) {
        errors.push(format!("{path}.rootFile: belongs to jwksUrl"));
    }
    Some(OidcIssuer {
        issuer: issuer?,
        audience: audience?,
        source: source?,
    })
}

fn kubernetes(mut section: Section, errors: &mut Vec<String>) -> Option<KubernetesAttestation> {
    let audience = section.required("audience", errors, not_empty);
    let node_service_account = section.parsed("nodeServiceAccount", errors, service_account);
    let people = section.parsed("people", errors, |s| match s {
        "allow" => Ok(true),
        "refuse" => Ok(false),
        _ => Err("is neither allow nor refuse"),
    });
    section.refuse_the_rest(errors);
    Some(KubernetesAttestation {
        audience: audience?,
        node_service_account,
        people: people.unwrap_or(false),
    })
}

fn not_empty(text: &str) -> Result<String, &'static str> {
    if text.is_empty() {
        Err("is empty")
    } else {
        Ok(text.to_owned())
    }
}

/// Keys fetched without TLS could be anybody's.
fn jwks_url(text: &str) -> Result<String, &'static str> {
    let uri: Uri = text.parse().map_err(|_| "is not a URL")?;
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let loopback = host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback());
    match uri.scheme_str() {
        Some("https") if !host.is_empty() => Ok(text.to_owned()),
        Some("http") if loopback => Ok(text.to_owned()),
        Some("http") => Err("is http, and not on the loopback: use https"),
        _ => Err("is neither an https URL nor an http URL on the loopback"),
    }
}

/// `namespace/name`.
pub(super) fn service_account(text: &str) -> Result<ObjectName, String> {
    let (namespace, name) = text
        .split_once('/')
        .ok_or("is not namespace/name of a service account")?;
    TrustDomain::default()
        .identity(namespace, name)
        .map_err(|error| format!("is not namespace/name of a service account: {error}"))?;
    Ok(ObjectName {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    })
}
