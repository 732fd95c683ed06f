//! Where certificates come from, and how the daemon proves which node it is.

use std::path::{Path, PathBuf};

use auth_mesh::TrustDomain;
use auth_support::config::{Section, absolute, server_name};

/// Source of certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CaSource {
    /// A folder with the trust domain's root key and certificate: this daemon signs.
    Directory(PathBuf),
    /// The trust domain's CA.
    Server(CaServer),
}

/// How to reach the trust domain's CA, or istiod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaServer {
    /// The section of the configuration that says so, for errors.
    pub section: &'static str,
    /// Host and port.
    pub address: String,
    /// The name in the CA's certificate. Defaults to the address's host.
    pub server_name: String,
    /// PEM file with the roots that the CA is verified against. Read again at each connection.
    pub root_file: PathBuf,
    /// What says which node this is.
    pub proof: Proof,
    /// The cluster that issued the token. istiod asks that cluster's API server about it. Defaults to `Kubernetes`, as
    /// in Istio.
    pub cluster_id: String,
}

/// What says to the CA, or to istiod, which node this is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proof {
    /// File with a bearer token. Read again when it is used.
    Token(PathBuf),
    /// A certificate of the node's own, which the CA issues for a one-time token.
    Join(Join),
}

/// How a machine joins the trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Join {
    /// The node's name.
    pub node: String,
    /// Its trust domain.
    pub trust_domain: TrustDomain,
    /// File with the one-time token. Read while the node has no valid certificate.
    pub token_file: PathBuf,
    /// Directory with the node's key and certificate. Defaults to `/var/lib/auth-daemon/node`.
    pub directory: PathBuf,
}

impl Proof {
    /// The file with the token.
    pub fn file(&self) -> &Path {
        match self {
            Self::Token(file) => file,
            Self::Join(join) => &join.token_file,
        }
    }
}

/// The fields that are read, or not, according to the source.
const FIELDS: [&str; 8] = [
    "directory",
    "address",
    "serverName",
    "rootFile",
    "tokenFile",
    "joinTokenFile",
    "nodeDirectory",
    "clusterId",
];
const DEFAULT_NODE_DIRECTORY: &str = "/var/lib/auth-daemon/node";
/// The ID of a mesh's only cluster in Istio.
pub(super) const DEFAULT_CLUSTER: &str = "Kubernetes";

/// Either a folder, or an address with what belongs to it.
pub(super) fn read(
    ca: &mut Section,
    node: Option<&str>,
    trust_domain: &TrustDomain,
    errors: &mut Vec<String>,
) -> Option<CaSource> {
    let has = |field| ca.has(field);
    match (has("directory"), has("address")) {
        (true, true) => {
            errors.push("ca: has directory and address; it is one or the other".into());
            FIELDS.into_iter().for_each(|field| ca.skip(field));
            None
        }
        (true, false) => ca
            .required("directory", errors, absolute)
            .map(CaSource::Directory),
        (false, true) => {
            let proof = proof(ca, node, trust_domain, errors);
            server("ca", ca, proof, errors).map(CaSource::Server)
        }
        (false, false) => {
            errors.push(
                "ca: has neither directory, a folder with the root key, nor address, where the CA is".into(),
            );
            FIELDS.into_iter().for_each(|field| ca.skip(field));
            None
        }
    }
}

/// Either the file of a token, or that of a one-time token with what belongs to it.
fn proof(
    ca: &mut Section,
    node: Option<&str>,
    trust_domain: &TrustDomain,
    errors: &mut Vec<String>,
) -> Option<Proof> {
    let directory = ca.parsed("nodeDirectory", errors, absolute);
    match (ca.has("tokenFile"), ca.has("joinTokenFile")) {
        (true, true) => {
            errors.push("ca: has tokenFile and joinTokenFile; it is one or the other".into());
            ca.skip("tokenFile");
            ca.skip("joinTokenFile");
            None
        }
        (true, false) => {
            if directory.is_some() {
                errors.push("ca.nodeDirectory: belongs to joinTokenFile".into());
            }
            ca.required("tokenFile", errors, absolute).map(Proof::Token)
        }
        (false, true) => Some(Proof::Join(Join {
            token_file: ca.parsed("joinTokenFile", errors, absolute)?,
            node: node?.to_owned(),
            trust_domain: trust_domain.clone(),
            directory: directory.unwrap_or_else(|| DEFAULT_NODE_DIRECTORY.into()),
        })),
        (false, false) => {
            errors.push(
                "ca.tokenFile: is missing, and so is ca.joinTokenFile: one of them says which node this is".into(),
            );
            None
        }
    }
}

/// How to reach the CA, or istiod.
pub(super) fn server(
    name: &'static str,
    section: &mut Section,
    proof: Option<Proof>,
    errors: &mut Vec<String>,
) -> Option<CaServer> {
    let address = section.required("address", errors, host_and_port);
    let server_name = section.parsed("serverName", errors, server_name);
    let root_file = section.required("rootFile", errors, absolute);
    let cluster_id = section.parsed("clusterId", errors, cluster_id);
    let (host, port) = address?;
    Some(CaServer {
        section: name,
        address: format!("{host}:{port}"),
        server_name: server_name.unwrap_or_else(|| host.trim_matches(['[', ']']).to_owned()),
        root_file: root_file?,
        proof: proof?,
        cluster_id: cluster_id.unwrap_or_else(|| DEFAULT_CLUSTER.into()),
    })
}

/// The ID of a cluster or network in Istio, which names no length and no characters. It is sent in a header.
pub(super) fn cluster_id(text: &str) -> Result<String, &'static str> {
    let printable = text.bytes().all(|b| b.is_ascii_graphic());
    match text.len() {
        1..=253 if printable => Ok(text.to_owned()),
        _ => Err("is not an ID: 1 to 253 printable ASCII characters"),
    }
}

/// `host:port`, with a name or an address (IPv6 in brackets) as the host.
fn host_and_port(text: &str) -> Result<(String, u16), &'static str> {
    let (host, port) = text.rsplit_once(':').ok_or("is not host:port")?;
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    if bare.is_none() && host.contains(':') {
        return Err("is not host:port; an IPv6 address goes in brackets");
    }
    server_name(bare.unwrap_or(host))?;
    match port.parse() {
        Ok(port) if port != 0 => Ok((host.to_owned(), port)),
        _ => Err("has no port from 1 to 65535"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn certificates_come_from_a_folder_or_from_a_server() {
        let parse = |ca: &str| {
            Config::parse(&format!(
                "nodeName: a\ndiscovery: {{files: /m}}\nca: {{{ca}}}\n"
            ))
        };
        let folder = parse("directory: /ca").unwrap();
        assert_eq!(folder.ca, CaSource::Directory("/ca".into()));
        let server = |address: &str, name: &str| {
            Ok(CaSource::Server(CaServer {
                section: "ca",
                address: address.into(),
                server_name: name.into(),
                root_file: "/r".into(),
                proof: Proof::Token("/t".into()),
                cluster_id: "Kubernetes".into(),
            }))
        };
        let source = |ca: &str| parse(ca).map(|config| config.ca);
        let files = "rootFile: /r, tokenFile: /t";
        assert_eq!(
            source(&format!("address: 'ca.example:15012', {files}")),
            server("ca.example:15012", "ca.example")
        );
        assert_eq!(
            source(&format!("address: '[fd00::1]:15012', {files}")),
            server("[fd00::1]:15012", "fd00::1")
        );
        assert_eq!(
            source(&format!("address: '10.0.0.1:1', serverName: ca.x, {files}")),
            server("10.0.0.1:1", "ca.x")
        );
        let example = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../deploy/example/machine.yaml"
        );
        Config::load(Path::new(example)).unwrap();
        // The Debian package's asks for one thing, and for nothing else.
        let packaged = include_str!("../../../deploy/debian/config.yaml");
        let errors = Config::parse(packaged).unwrap_err();
        assert!(
            errors.len() == 1 && errors[0].starts_with("ca: has neither directory"),
            "{errors:?}"
        );
        Config::parse(&packaged.replace("# address:", "address:")).unwrap();
        let joined = source("address: 'ca:1', rootFile: /r, joinTokenFile: /j").unwrap();
        let CaSource::Server(joined) = joined else {
            panic!("{joined:?}");
        };
        assert_eq!(
            joined.proof,
            Proof::Join(Join {
                node: "a".into(),
                trust_domain: TrustDomain::default(),
                token_file: "/j".into(),
                directory: DEFAULT_NODE_DIRECTORY.into(),
            })
        );
        for (wrong, error) in [
            (
                "address: 'ca:1', directory: /ca",
                "ca: has directory and address",
            ),
            ("address: 'ca:1'", "ca.rootFile: is missing"),
            ("address: 'ca:1'", "ca.tokenFile: is missing"),
            (
                "address: 'ca:1', tokenFile: /t, joinTokenFile: /j",
                "ca: has tokenFile and joinTokenFile",
            ),
            (
                "address: 'ca:1', tokenFile: /t, nodeDirectory: /n",
                "ca.nodeDirectory: belongs to joinTokenFile",
            ),
            (
                "address: 'ca:1', joinTokenFile: j",
                "ca.joinTokenFile: \"j\": is not an absolute path",
            ),
            ("address: ca", "ca.address: \"ca\": is not host:port"),
            ("address: 'fd00::1:15012'", "IPv6 address goes in brackets"),
            ("address: 'ca:0'", "has no port"),
            ("address: 'c a:1'", "neither a DNS name nor an IP address"),
            (
                "directory: /ca, tokenFile: /t",
                "ca.tokenFile: there is no such field",
            ),
        ] {
            let errors = source(wrong).unwrap_err().join("\n");
            assert!(
                errors.contains(error),
                "{wrong}: {error:?} is not in:\n{errors}"
            );
        }
    }
}
