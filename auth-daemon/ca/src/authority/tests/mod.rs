mod certificates;
mod joining;
mod jwt;
mod opening;
mod revoking;
mod rotating;
mod storing;

use std::{
    os::unix::fs::MetadataExt,
    path::Path,
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
};

use auth_ca_api::pem;
use auth_mesh::TrustDomain;
use auth_tunnel::tls::{crl, svid::NODE_EXTENSION};
use rcgen::{BasicConstraints, CertificateParams, CustomExtension, IsCa, KeyPair, SanType};
use serde_json::json;
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::*;
use crate::{config::KeyAlgorithm, embedded::EmbeddedCa, store::directory::DirectoryStore};

const DAY: u64 = 24 * 60 * 60;
const WEB: &str = "spiffe://cluster.local/ns/default/sa/web";

fn identity(text: &str) -> Identity {
    text.parse().unwrap()
}

fn roots() -> RootSettings {
    RootSettings {
        algorithm: KeyAlgorithm::P256,
        lifetime: Duration::from_secs(1000 * DAY),
        spread: Duration::from_secs(300),
    }
}

fn settings() -> Settings {
    Settings {
        trust_domain: "cluster.local".parse().unwrap(),
        root: Root::SelfSigned(roots()),
        max_lifetime: Duration::from_secs(DAY),
        taken_nodes: Some(["a".to_owned()].into()),
    }
}

/// A clock that a test sets. It starts now, because OpenSSL uses the real time.
#[derive(Clone)]
struct FakeClock(Arc<AtomicU64>);

impl FakeClock {
    fn new() -> Self {
        Self(Arc::new(unix_seconds(SystemTime::now()).into()))
    }

    fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    fn pass(&self, seconds: u64) {
        self.0.fetch_add(seconds, Ordering::SeqCst);
    }

    fn clock(&self) -> Clock {
        let clock = self.clone();
        Clock::new(move || UNIX_EPOCH + Duration::from_secs(clock.now()))
    }
}

async fn open_with(folder: &Path, settings: Settings, clock: &FakeClock) -> Arc<Authority> {
    let store = Arc::new(DirectoryStore::open(folder).unwrap());
    Authority::open_at(store, settings, clock.clock())
        .await
        .unwrap()
}

/// A new CA, with its directory and its clock.
async fn fresh() -> (tempfile::TempDir, FakeClock, Arc<Authority>) {
    let (folder, clock) = (tempfile::tempdir().unwrap(), FakeClock::new());
    let ca = open_with(folder.path(), settings(), &clock).await;
    (folder, clock, ca)
}

async fn refused(folder: &Path, settings: Settings) -> String {
    let store = Arc::new(DirectoryStore::open(folder).unwrap());
    let opened = Authority::open(store, settings).await;
    opened.err().unwrap().to_string()
}

fn csr() -> Vec<u8> {
    let key = KeyPair::generate().unwrap();
    CertificateParams::default()
        .serialize_request(&key)
        .unwrap()
        .der()
        .to_vec()
}

fn svid(chain: &[CertificateDer<'_>]) -> Svid {
    Svid::parse(&chain[0], &TrustDomain::default()).unwrap()
}

fn serial(chain: &[CertificateDer<'_>]) -> Serial {
    let (_, leaf) = X509Certificate::from_der(&chain[0]).unwrap();
    Serial(leaf.raw_serial().try_into().unwrap())
}

/// Issues a certificate of the longest lifetime.
fn issue(
    ca: &Authority,
    account: &str,
    node: &str,
) -> Result<Vec<CertificateDer<'static>>, Refusal> {
    let identity = identity(&format!("spiffe://cluster.local/ns/default/sa/{account}"));
    let issued = ca.issue(&identity, &csr(), Duration::ZERO, Holder::Node(node))?;
    Ok(issued.chain)
}

/// The serial numbers on the first published list, with their reasons, sorted.
fn listed(ca: &Authority) -> Vec<(String, &'static str)> {
    let published = ca.published().borrow().clone();
    let signers = [published.roots.clone(), published.intermediates.clone()].concat();
    let list = crl::read(&published.crls[0], &signers).unwrap();
    let mut list: Vec<_> = list.into_iter().map(|(s, r)| (s, r.as_str())).collect();
    list.sort();
    list
}

/// Runs `openssl` with these files. Returns its output and whether it succeeds.
fn openssl(arguments: &str, files: &[(&str, String)]) -> (String, bool) {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        std::fs::write(folder.path().join(name), content).unwrap();
    }
    let mut command = Command::new("openssl");
    command
        .args(arguments.split(' '))
        .current_dir(folder.path());
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (
        String::from_utf8_lossy(&text).into_owned(),
        output.status.success(),
    )
}

/// Verifies `chain` with OpenSSL and the published revocation lists.
fn verifies(chain: &[CertificateDer<'_>], published: &Published, at: u64) -> Result<(), String> {
    let crls = published
        .crls
        .iter()
        .map(|crl| pem::encode("X509 CRL", crl))
        .collect();
    assert_eq!(chain.len(), 1, "a root signs leaves directly");
    let (text, verified) = openssl(
        &format!("verify -x509_strict -crl_check -attime {at} -CAfile roots -CRLfile crls leaf"),
        &[
            ("roots", pem::certificates(&published.roots)),
            ("leaf", pem::certificates(chain)),
            ("crls", crls),
        ],
    );
    if verified { Ok(()) } else { Err(text) }
}

/// Checks what zlint checks in a leaf certificate.
fn lint(der: &[u8]) {
    use x509_parser::{
        extensions::{GeneralName, ParsedExtension as E},
        oid_registry::*,
    };
    let (rest, certificate) = X509Certificate::from_der(der).unwrap();
    assert!(rest.is_empty());
    assert_eq!(certificate.version().0, 2, "version 3");
    let serial = certificate.raw_serial();
    assert!(serial.len() <= 20 && serial[0] < 0x80 && serial.iter().any(|&b| b != 0));
    assert_eq!(serial.len(), 16);
    let validity = certificate.validity();
    assert!(validity.not_before < validity.not_after);
    for time in [validity.not_before, validity.not_after] {
        assert_eq!(
            time.is_utctime(),
            time.to_datetime().year() < 2050,
            "RFC 5280 §4.1.2.5"
        );
    }
    assert_eq!(
        certificate.signature_algorithm,
        certificate.tbs_certificate.signature
    );
    let mut seen = Vec::new();
    for extension in certificate.extensions() {
        assert!(!seen.contains(&extension.oid), "no extension twice");
        seen.push(extension.oid.clone());
        let critical = match extension.parsed_extension() {
            E::SubjectAlternativeName(names) => {
                assert!(!names.general_names.is_empty());
                for name in &names.general_names {
                    assert!(!matches!(
                        name,
                        GeneralName::URI("") | GeneralName::DNSName("")
                    ));
                }
                certificate.subject().iter().next().is_none()
            }
            E::KeyUsage(usage) => {
                assert_eq!(usage.flags, 1, "digitalSignature and nothing else");
                true
            }
            E::BasicConstraints(constraints) => {
                assert!(!constraints.ca && constraints.path_len_constraint.is_none());
                true
            }
            E::ExtendedKeyUsage(_) | E::AuthorityKeyIdentifier(_) | E::SubjectKeyIdentifier(_) => {
                false
            }
            E::UnsupportedExtension { oid } => {
                let arcs: Vec<_> = oid.iter().unwrap().collect();
                assert_eq!(arcs, NODE_EXTENSION, "the node's name and nothing else");
                false
            }
            other => panic!("unknown extension {other:?}"),
        };
        assert_eq!(extension.critical, critical, "{}", extension.oid);
    }
    for needed in [
        OID_X509_EXT_SUBJECT_ALT_NAME,
        OID_X509_EXT_KEY_USAGE,
        OID_X509_EXT_BASIC_CONSTRAINTS,
        OID_X509_EXT_EXTENDED_KEY_USAGE,
        OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER,
        OID_X509_EXT_SUBJECT_KEY_IDENTIFIER,
    ] {
        assert!(seen.contains(&needed), "{needed}");
    }
}
