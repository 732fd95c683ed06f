//! The CA's configuration file, and what follows from it.

mod attestation;
mod bundle_endpoint;

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use auth_mesh::TrustDomain;
use auth_support::{
    config::{InvalidConfig, Section, absolute, duration, load, server_name},
    log::Log,
};

use attestation::service_account;
pub use attestation::{
    Attestation, JwksAttestation, JwksSource, KubernetesAttestation, NodeToken, OidcIssuer,
    PeopleAttestation, PersonAccount,
};
pub use bundle_endpoint::{BundleEndpoint, EndpointCertificate};

/// Longest lifetime of a certificate.
pub const MAX_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
/// Shortest lifetime of a certificate.
pub const MIN_LIFETIME: Duration = Duration::from_secs(10);
/// The operator socket unless configured otherwise.
pub const DEFAULT_OPERATOR_SOCKET: &str = "/run/auth-daemon-ca/operator.sock";
const DEFAULT_PORT: u16 = 15012;
const MINUTE: Duration = Duration::from_secs(60);
const YEAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);
const DEFAULT_STATE_SECRET: &str = "auth-daemon-ca";
const DEFAULT_LEASE: &str = "auth-daemon-ca";

/// A checked configuration of the CA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaConfig {
    /// Its trust domain. Defaults to `cluster.local`.
    pub trust_domain: TrustDomain,
    /// Where it listens. Defaults to port 15012 of all IPv4 addresses.
    pub listen: SocketAddr,
    /// DNS names and IP addresses in its server certificate, by which callers reach it.
    pub server_names: Vec<String>,
    /// Where it answers `GET /healthz/ready` and `GET /metrics`.
    pub readiness: Option<SocketAddr>,
    /// Where other trust domains fetch this one's bundle, if anywhere.
    pub bundle_endpoint: Option<BundleEndpoint>,
    /// The operator's socket. Defaults to [`DEFAULT_OPERATOR_SOCKET`].
    pub operator_socket: PathBuf,
    /// Where it keeps its state.
    pub state: State,
    /// Where its signing key comes from.
    pub root: Root,
    /// Longest lifetime of a certificate, between 10 seconds and 24 hours. Defaults to 24 hours.
    pub certificate_lifetime: Duration,
    /// How callers are identified.
    pub attestation: Attestation,
    /// Directory of Kubernetes manifests that say which pods run where, instead of the API server.
    pub manifests: Option<PathBuf>,
    /// Namespaces in which each service account gets a Secret with key and certificate.
    pub secret_namespaces: Vec<String>,
    /// Log settings.
    pub log: Log,
}

/// Where the signing key comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Root {
    /// The CA makes roots of its own.
    SelfSigned(RootSettings),
    /// It signs as an intermediate, with the files in this directory, in Istio's layout (ca-cert.pem, ca-key.pem,
    /// root-cert.pem, cert-chain.pem).
    Intermediate(PathBuf),
}

/// How to make roots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootSettings {
    /// Algorithm of new keys.
    pub algorithm: KeyAlgorithm,
    /// Lifetime of new roots.
    pub lifetime: Duration,
    /// How long a new root is published before it signs.
    pub spread: Duration,
}

impl Default for RootSettings {
    /// A P-256 key for ten years, published for an hour before it signs.
    fn default() -> Self {
        Self {
            algorithm: KeyAlgorithm::P256,
            lifetime: 10 * YEAR,
            spread: 60 * MINUTE,
        }
    }
}

/// Algorithms of the keys that the CA makes for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyAlgorithm {
    /// ECDSA on P-256.
    P256,
    /// ECDSA on P-384.
    P384,
    /// Ed25519.
    Ed25519,
}

/// Settings of the authority.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its trust domain.
    pub trust_domain: TrustDomain,
    /// Where its signing key comes from.
    pub root: Root,
    /// Longest lifetime of a certificate.
    pub max_lifetime: Duration,
    /// Names with which no machine can join: those of `attestation.tokens`. `None` if no machine can join at all,
    /// because the API server says which pods run where.
    pub taken_nodes: Option<BTreeSet<String>>,
}

/// Where the CA keeps its state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// A directory.
    Directory(PathBuf),
    /// The cluster where it runs.
    Kubernetes(KubernetesState),
}

/// State in a cluster, with leader election.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubernetesState {
    /// Namespace of the Secret and the Lease.
    pub namespace: String,
    /// Name of the Secret with the state. Defaults to `auth-daemon-ca`.
    pub state_secret: String,
    /// The Lease of the leader election. Defaults to `auth-daemon-ca`.
    pub lease: String,
    /// Name of the ConfigMap that publishes the roots in every namespace, if any.
    pub root_config_map: Option<String>,
}

impl CaConfig {
    /// Reads and checks `file`.
    pub fn load(file: &Path) -> Result<Self, InvalidConfig> {
        load(file, Self::parse)
    }

    /// Checks `text`. Every error names its field.
    pub fn parse(text: &str) -> Result<Self, Vec<String>> {
        let mut errors = Vec::new();
        let errors = &mut errors;
        let mut top = Section::of_yaml(text, errors)?;
        let trust_domain = top.parsed("trustDomain", errors, TrustDomain::from_str);
        let listen = top.parsed("listen", errors, socket_address);
        let server_names = server_names(&mut top, errors);
        let readiness = top.parsed("readiness", errors, socket_address);
        let bundle_endpoint = BundleEndpoint::read(&mut top, errors);
        let operator_socket = top.parsed("operatorSocket", errors, absolute);
        let state = state(&mut top, errors);
        let root = signing_key(&mut top, errors);
        let certificate_lifetime = top.parsed("certificateLifetime", errors, |s| {
            duration(s, MIN_LIFETIME, MAX_LIFETIME)
        });
        let attestation = Attestation::read(&mut top, errors);
        let mut discovery = top.section("discovery", errors);
        let manifests = discovery.parsed("files", errors, absolute);
        if manifests.is_none() && !matches!(state, Some(State::Kubernetes(_))) {
            errors.push(
                "discovery.files: is missing: without an API server, it says which pods run on which node".into(),
            );
        }
        if let Some(attestation) = &attestation
            && manifests.is_none()
            && attestation.tokens.is_empty()
            && attestation.jwks.is_none()
            && attestation.kubernetes.is_none()
        {
            errors.push(
                "attestation: has none of tokens, jwks and kubernetes: nobody can ask for a certificate".into(),
            );
        }
        let mut secrets = top.section("secrets", errors);
        let secret_namespaces = secrets.list("namespaces", errors, kubernetes_namespace);
        if secret_namespaces
            .as_ref()
            .is_some_and(|names| !names.is_empty())
            && matches!(state, Some(State::Directory(_)))
        {
            errors.push("secrets.namespaces: needs kubernetes instead of directory: Secrets belong to a cluster".into());
        }
        let log = Log::read(&mut top, errors);
        for section in [discovery, secrets, top] {
            section.refuse_the_rest(errors);
        }
        let (Some(server_names), Some(state), Some(root), Some(attestation), []) =
            (server_names, state, root, attestation, errors.as_slice())
        else {
            return Err(std::mem::take(errors));
        };
        Ok(Self {
            trust_domain: trust_domain.unwrap_or_default(),
            listen: listen.unwrap_or_else(|| (Ipv4Addr::UNSPECIFIED, DEFAULT_PORT).into()),
            server_names,
            readiness,
            bundle_endpoint,
            operator_socket: operator_socket.unwrap_or_else(|| DEFAULT_OPERATOR_SOCKET.into()),
            state,
            root,
            certificate_lifetime: certificate_lifetime.unwrap_or(MAX_LIFETIME),
            attestation,
            manifests,
            secret_namespaces: secret_namespaces.unwrap_or_default(),
            log,
        })
    }

    /// The settings of the authority.
    pub fn settings(&self) -> Settings {
        Settings {
            trust_domain: self.trust_domain.clone(),
            root: self.root.clone(),
            max_lifetime: self.certificate_lifetime,
            taken_nodes: self.manifests.as_ref().map(|_| {
                let tokens = self.attestation.tokens.iter();
                tokens.map(|token| token.node.clone()).collect()
            }),
        }
    }
}

fn socket_address(text: &str) -> Result<SocketAddr, &'static str> {
    text.parse()
        .map_err(|_| "is not an IP address and a port, such as 0.0.0.0:15012 or '[::]:15012'")
}

fn server_names(top: &mut Section, errors: &mut Vec<String>) -> Option<Vec<String>> {
    let given = top.has("serverNames");
    let before = errors.len();
    let names = top.list("serverNames", errors, server_name);
    if !given || (names.as_ref().is_some_and(Vec::is_empty) && errors.len() == before) {
        errors.push(
            "serverNames: is missing: the DNS names and IP addresses by which callers reach this CA".into(),
        );
    }
    names.filter(|names| !names.is_empty())
}

fn state(top: &mut Section, errors: &mut Vec<String>) -> Option<State> {
    match (top.has("directory"), top.has("kubernetes")) {
        (true, true) => {
            errors.push("has directory and kubernetes: state is kept in one or the other".into());
            top.skip("directory");
            top.skip("kubernetes");
            None
        }
        (true, false) => top
            .required("directory", errors, absolute)
            .map(State::Directory),
        (false, true) => {
            let mut section = top.section("kubernetes", errors);
            let namespace = section.required("namespace", errors, kubernetes_namespace);
            let state_secret = section.parsed("stateSecret", errors, |name| {
                // It is also a label's value.
                kubernetes_object(name).and_then(|name| match name.len() {
                    ..=63 => Ok(name),
                    _ => Err("is longer than 63 characters".to_owned()),
                })
            });
            let lease = section.parsed("lease", errors, kubernetes_object);
            let root_config_map = section.parsed("rootConfigMap", errors, kubernetes_object);
            section.refuse_the_rest(errors);
            Some(State::Kubernetes(KubernetesState {
                namespace: namespace?,
                state_secret: state_secret.unwrap_or_else(|| DEFAULT_STATE_SECRET.into()),
                lease: lease.unwrap_or_else(|| DEFAULT_LEASE.into()),
                root_config_map,
            }))
        }
        (false, false) => {
            errors.push(
                "has neither directory nor kubernetes: one of them keeps the CA's state".into(),
            );
            None
        }
    }
}

fn signing_key(top: &mut Section, errors: &mut Vec<String>) -> Option<Root> {
    let intermediate = top.has("pluggedIn");
    if intermediate {
        for field in ["keyAlgorithm", "rootLifetime", "rotationSpread"] {
            if top.has(field) {
                errors.push(format!(
                    "{field}: configures new roots, but pluggedIn provides one; remove one of the two"
                ));
                top.skip(field);
            }
        }
        return top
            .parsed("pluggedIn", errors, absolute)
            .map(Root::Intermediate);
    }
    let algorithm = top.parsed("keyAlgorithm", errors, |s| match s {
        "P-256" => Ok(KeyAlgorithm::P256),
        "P-384" => Ok(KeyAlgorithm::P384),
        "Ed25519" => Ok(KeyAlgorithm::Ed25519),
        _ => Err("is none of P-256, P-384 and Ed25519"),
    });
    let lifetime = top.parsed("rootLifetime", errors, |s| duration(s, MINUTE, 30 * YEAR));
    let spread = top.parsed("rotationSpread", errors, |s| {
        duration(s, Duration::from_secs(1), YEAR)
    });
    let default = RootSettings::default();
    Some(Root::SelfSigned(RootSettings {
        algorithm: algorithm.unwrap_or(default.algorithm),
        lifetime: lifetime.unwrap_or(default.lifetime),
        spread: spread.unwrap_or(default.spread),
    }))
}

fn kubernetes_namespace(name: &str) -> Result<String, String> {
    service_account(&format!("{name}/x"))
        .map(|account| account.namespace)
        .map_err(|_| "is not the name of a namespace".into())
}

fn kubernetes_object(name: &str) -> Result<String, String> {
    service_account(&format!("x/{name}"))
        .map(|account| account.name)
        .map_err(|_| "is not the name of a Kubernetes object".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "serverNames: [ca]\ndirectory: /ca\ndiscovery: {files: /m}\n\
                         attestation: {tokens: [{node: a, tokenFile: /t}]}\n";

    #[test]
    fn defaults() {
        let config = CaConfig::parse(SMALL).unwrap();
        assert_eq!(config.trust_domain.as_str(), "cluster.local");
        assert_eq!(config.listen.to_string(), "0.0.0.0:15012");
        assert_eq!(config.operator_socket, Path::new(DEFAULT_OPERATOR_SOCKET));
        assert_eq!(config.certificate_lifetime, Duration::from_secs(86400));
        assert_eq!((config.readiness, config.bundle_endpoint), (None, None));
        assert_eq!(
            config.root,
            Root::SelfSigned(RootSettings {
                algorithm: KeyAlgorithm::P256,
                lifetime: Duration::from_secs(87600 * 3600),
                spread: Duration::from_secs(3600),
            })
        );
    }

    #[test]
    fn the_example_is_a_configuration() {
        let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/example/ca.yaml");
        let config = CaConfig::load(Path::new(example)).unwrap();
        assert_eq!(config.attestation.tokens.len(), 2);
        assert!(config.readiness.is_some());
    }

    #[test]
    fn reads_every_field() {
        let config = CaConfig::parse(
            "trustDomain: example.org\n\
             listen: '[::]:1'\n\
             serverNames: [ca.example, 10.0.0.1, 'fd00::1']\n\
             readiness: 127.0.0.1:2\n\
             operatorSocket: /x/y\n\
             kubernetes: {namespace: mesh, stateSecret: state, lease: leader, rootConfigMap: roots}\n\
             keyAlgorithm: Ed25519\n\
             rootLifetime: 1m\n\
             rotationSpread: 1s\n\
             certificateLifetime: 10s\n\
             attestation:\n\
             \x20 tokens: [{node: a, tokenFile: /a}, {node: b, tokenFile: /b}]\n\
             \x20 jwks: {issuer: i, audience: u, jwksUrl: 'https://x/keys', rootFile: /r, nodeServiceAccount: mesh/daemon}\n\
             \x20 people: {issuer: p, audience: u, jwksFile: /k, nameClaim: email, accounts: [\
             {account: default/support, groups: [oncall]}, {account: default/admin, names: [alice@example.com]}]}\n\
             \x20 kubernetes: {audience: v, nodeServiceAccount: mesh/daemon, people: allow}\n\
             secrets: {namespaces: [default, shop]}\n\
             log: {format: json}\n",
        )
        .unwrap();
        assert_eq!(config.server_names.len(), 3);
        assert_eq!(
            config.state,
            State::Kubernetes(KubernetesState {
                namespace: "mesh".into(),
                state_secret: "state".into(),
                lease: "leader".into(),
                root_config_map: Some("roots".into()),
            })
        );
        assert_eq!(config.settings().max_lifetime, Duration::from_secs(10));
        assert_eq!(config.manifests, None);
        assert_eq!(config.attestation.tokens[1].node, "b");
        let jwks = config.attestation.jwks.unwrap();
        assert!(matches!(
            &jwks.issuer.source,
            JwksSource::Url {
                root_file: Some(_),
                ..
            }
        ));
        assert_eq!(
            jwks.node_service_account.unwrap().to_string(),
            "mesh/daemon"
        );
        let people = config.attestation.people.unwrap();
        assert_eq!(
            (&*people.name_claim, &*people.groups_claim),
            ("email", "groups")
        );
        let accounts: Vec<_> = people
            .accounts
            .iter()
            .map(|one| one.account.to_string())
            .collect();
        assert_eq!(accounts, ["default/support", "default/admin"]);
        assert_eq!(people.accounts[0].groups, ["oncall"]);
        let kubernetes = config.attestation.kubernetes.unwrap();
        assert_eq!((&*kubernetes.audience, kubernetes.people), ("v", true));
        assert_eq!(config.secret_namespaces, ["default", "shop"]);
        let intermediate = CaConfig::parse(&format!("{SMALL}pluggedIn: /etc/cacerts\n")).unwrap();
        assert_eq!(intermediate.root, Root::Intermediate("/etc/cacerts".into()));
    }

    #[test]
    fn reports_all_errors_at_once() {
        let errors = CaConfig::parse(
            "listen: ca:15012\nserverNames: ['c a']\ndirectory: ca\npluggedIn: /x\nrootLifetime: 24h\n\
             certificateLifetime: 48h\nreadiness: 1\nmood: good\nsecrets: {namespaces: [A]}\n\
             attestation:\n\
             \x20 tokens: [{node: a}, {node: b, tokenFile: /b, colour: red}, {node: b, tokenFile: /c}, x]\n\
             \x20 jwks: {issuer: '', jwksUrl: 'http://example.org/keys', nodeServiceAccount: daemon}\n\
             \x20 people: {issuer: i, audience: u, accounts: [{account: a}, {account: a/b, names: ['']}]}\n\
             \x20 kubernetes: {people: all}\n",
        )
        .unwrap_err();
        let text = errors.join("\n");
        for expected in [
            "listen: \"ca:15012\": is not an IP address and a port",
            "serverNames[0]: \"c a\"",
            "directory: \"ca\": is not an absolute path",
            "rootLifetime: configures new roots, but pluggedIn provides one",
            "certificateLifetime: \"48h\": is not between",
            "readiness: 1 is not a string",
            "mood: there is no such field",
            "secrets.namespaces[0]: \"A\": is not the name of a namespace",
            "attestation.tokens[0].tokenFile: is missing",
            "attestation.tokens[1].colour: there is no such field",
            "attestation.tokens[2].node: \"b\" has a token already",
            "attestation.tokens[3]: is not a mapping",
            "attestation.jwks.issuer: \"\": is empty",
            "attestation.jwks.audience: is missing",
            "attestation.jwks.jwksUrl: \"http://example.org/keys\": is http, and not on the loopback",
            "attestation.jwks.nodeServiceAccount: \"daemon\": is not namespace/name",
            "attestation.people: needs one of jwksFile and jwksUrl",
            "attestation.people.accounts[0].account: \"a\": is not namespace/name",
            "attestation.people.accounts[0]: has neither names nor groups",
            "attestation.people.accounts[1].names[0]: \"\": is empty",
            "attestation.kubernetes.audience: is missing",
            "attestation.kubernetes.people: \"all\": is neither allow nor refuse",
            "discovery.files: is missing",
        ] {
            assert!(text.contains(expected), "{expected:?} is not in:\n{text}");
        }
        let errors = CaConfig::parse("{}").unwrap_err().join("\n");
        for expected in [
            "serverNames: is missing",
            "has neither directory",
            "attestation: has none of tokens, jwks and kubernetes",
        ] {
            assert!(
                errors.contains(expected),
                "{expected:?} is not in:\n{errors}"
            );
        }
        assert!(
            !errors.contains("serverNames: is missing\nserverNames"),
            "{errors}"
        );
        let secrets =
            CaConfig::parse(&format!("{SMALL}secrets: {{namespaces: [a]}}\n")).unwrap_err();
        assert!(secrets[0].contains("needs kubernetes"), "{secrets:?}");
        let both = CaConfig::parse(&format!("{SMALL}kubernetes: {{namespace: x}}\n")).unwrap_err();
        assert!(both[0].contains("one or the other"), "{both:?}");
    }
}
