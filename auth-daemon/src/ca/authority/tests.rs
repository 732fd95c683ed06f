use std::{
    os::unix::fs::MetadataExt,
    path::Path,
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
};

use rcgen::{BasicConstraints, CertificateParams, CustomExtension, IsCa, KeyPair, SanType};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{
    super::{
        embedded::EmbeddedCa,
        pem,
        revocation::read_crl,
        store::{
            directory::DirectoryStore,
            disk::{Disk, tests::Faults},
        },
    },
    *,
};
use crate::{mesh::TrustDomain, tunnel::svid::Svid};

const DAY: u64 = 24 * 60 * 60;
const WEB: &str = "spiffe://cluster.local/ns/default/sa/web";

fn identity(text: &str) -> Identity {
    text.parse().unwrap()
}

fn settings() -> Settings {
    Settings {
        trust_domain: "cluster.local".parse().unwrap(),
        root: Root::SelfSigned {
            algorithm: KeyAlgorithm::P256,
            lifetime: Duration::from_secs(1000 * DAY),
            spread: Duration::from_secs(300),
        },
        max_lifetime: Duration::from_secs(DAY),
    }
}

/// A clock that a test sets. Begins now: OpenSSL has the real one.
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

async fn open_with(folder: &Path, settings: Settings, clock: &FakeClock) -> Authority {
    let store = Arc::new(DirectoryStore::open(folder).unwrap());
    Authority::open_at(store, settings, clock.clock())
        .await
        .unwrap()
}

async fn refused(folder: &Path, settings: Settings) -> String {
    let store = Arc::new(DirectoryStore::open(folder).unwrap());
    let opened = Authority::open(store, settings).await;
    opened.unwrap_err().to_string()
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
    Svid::parse(&chain[0], "cluster.local").unwrap()
}

fn serial(chain: &[CertificateDer<'_>]) -> [u8; 16] {
    X509Certificate::from_der(&chain[0])
        .unwrap()
        .1
        .raw_serial()
        .try_into()
        .unwrap()
}

/// Runs `openssl`, with the files that are named, and returns what it says and whether it succeeds.
fn openssl(arguments: &[&str], files: &[(&str, String)]) -> (String, bool) {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        std::fs::write(folder.path().join(name), content).unwrap();
    }
    let output = Command::new("openssl")
        .args(arguments)
        .current_dir(folder.path())
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (
        String::from_utf8_lossy(&said).into_owned(),
        output.status.success(),
    )
}

fn all(certificates: &[CertificateDer<'_>]) -> String {
    certificates
        .iter()
        .map(|der| pem::certificate(der))
        .collect()
}

/// Whether OpenSSL believes `chain`, with the revocation lists that are published.
fn verifies(chain: &[CertificateDer<'_>], published: &Published) -> Result<(), String> {
    let crls: String = published
        .crls
        .iter()
        .map(|crl| pem::encode("X509 CRL", crl))
        .collect();
    assert_eq!(chain.len(), 1, "a root of its own signs leaves");
    let (said, held) = openssl(
        &[
            "verify",
            "-x509_strict",
            "-crl_check",
            "-CAfile",
            "roots",
            "-CRLfile",
            "crls",
            "leaf",
        ],
        &[
            ("roots", all(&published.roots)),
            ("leaf", all(chain)),
            ("crls", crls),
        ],
    );
    if held { Ok(()) } else { Err(said) }
}

/// What zlint would look at in any certificate that is issued here.
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

#[tokio::test]
async fn issues_what_openssl_and_lints_take() {
    for algorithm in [
        KeyAlgorithm::P256,
        KeyAlgorithm::P384,
        KeyAlgorithm::Ed25519,
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = settings();
        let Root::SelfSigned {
            algorithm: chosen, ..
        } = &mut settings.root
        else {
            unreachable!()
        };
        *chosen = algorithm;
        let clock = FakeClock::new();
        let ca = open_with(folder.path(), settings, &clock).await;
        // What else the CSR asks for comes to nothing.
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["evil.example".into()]).unwrap();
        params.subject_alt_names.push(SanType::URI(
            "spiffe://cluster.local/ns/a/sa/root".try_into().unwrap(),
        ));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.custom_extensions =
            vec![CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0])];
        let csr = params.serialize_request(&key).unwrap();
        let chain = ca
            .issue(
                &identity(WEB),
                csr.der(),
                Duration::from_secs(3600),
                Some("node-a"),
            )
            .await
            .unwrap();
        assert_eq!(chain.len(), 1, "without the root");
        lint(&chain[0]);
        let svid = svid(&chain);
        assert_eq!(svid.identity.as_str(), WEB);
        assert_eq!(unix_seconds(svid.not_before), clock.now() - 60);
        assert_eq!(unix_seconds(svid.not_after), clock.now() + 3600);
        let published = ca.published().borrow().clone();
        verifies(&chain, &published).unwrap();

        let (text, _) = openssl(
            &["x509", "-noout", "-text", "-in", "leaf"],
            &[("leaf", all(&chain))],
        );
        for expected in [
            "Version: 3 (0x2)",
            "Subject: \n",
            "X509v3 Subject Alternative Name: critical\n                URI:spiffe://cluster.local/ns/default/sa/web\n",
            "X509v3 Key Usage: critical\n                Digital Signature\n",
            "X509v3 Extended Key Usage: \n                TLS Web Server Authentication, TLS Web Client Authentication\n",
            "X509v3 Basic Constraints: critical\n                CA:FALSE\n",
            "X509v3 Authority Key Identifier",
            "X509v3 Subject Key Identifier",
        ] {
            assert!(text.contains(expected), "{expected:?} in\n{text}");
        }
        assert!(
            !text.contains("evil") && !text.contains("1.2.3.4"),
            "{text}"
        );
        let roots = all(&published.roots);
        let (text, _) = openssl(
            &["x509", "-noout", "-text", "-in", "root"],
            &[("root", roots)],
        );
        for expected in [
            "CA:TRUE, pathlen:0",
            "Certificate Sign, CRL Sign",
            "URI:spiffe://cluster.local\n",
        ] {
            assert!(text.contains(expected), "{expected:?} in\n{text}");
        }

        let record = ca.issued(&serial(&chain)).unwrap();
        assert_eq!(record.identity.as_str(), WEB);
        assert_eq!(record.node.as_deref(), Some("node-a"));
        assert_eq!(record.signer, 1);
        clock.pass(3601);
        assert_eq!(ca.issued(&record.serial), None);
    }
}

#[tokio::test]
async fn lives_are_clamped() {
    let folder = tempfile::tempdir().unwrap();
    let clock = FakeClock::new();
    let ca = open_with(folder.path(), settings(), &clock).await;
    let life = async |seconds| {
        let wanted = Duration::from_secs(seconds);
        let chain = ca.issue(&identity(WEB), &csr(), wanted, None).await?;
        Ok::<_, Refusal>(unix_seconds(svid(&chain).not_after) - clock.now())
    };
    assert_eq!(life(10).await.unwrap(), 10);
    assert_eq!(life(0).await.unwrap(), DAY);
    assert_eq!(life(u64::MAX).await.unwrap(), DAY);
    assert!(matches!(life(9).await, Err(Refusal::Request(_))));
    // Near the root's end nothing outlives it, and at last nothing is issued.
    clock.pass(1000 * DAY - 100);
    assert_eq!(life(0).await.unwrap(), 100);
    clock.pass(41);
    let error = life(0).await.unwrap_err();
    assert!(
        matches!(&error, Refusal::State(why) if why.contains("ends in 59 s")),
        "{error}"
    );
    clock.pass(60);
    assert!(life(0).await.unwrap_err().to_string().contains("has ended"));
}

#[tokio::test]
async fn refuses_requests() {
    let folder = tempfile::tempdir().unwrap();
    let ca = open_with(folder.path(), settings(), &FakeClock::new()).await;
    let hour = Duration::from_secs(3600);
    let other = identity("spiffe://example.org/ns/default/sa/web");
    let error = ca.issue(&other, &csr(), hour, None).await.unwrap_err();
    assert!(matches!(error, Refusal::Request(_)));
    let error = ca
        .issue(&identity(WEB), b"rubbish", hour, None)
        .await
        .unwrap_err();
    assert!(matches!(error, Refusal::Request(_)));
    // Its own key, by who has stolen it.
    let state = std::fs::read(folder.path().join("ca.json")).unwrap();
    let core = Core::from_json(&state).unwrap();
    let key = signer::key_from_pem(core.signers[&1].key.as_ref().unwrap()).unwrap();
    let csr = CertificateParams::default()
        .serialize_request(&key)
        .unwrap();
    let error = ca
        .issue(&identity(WEB), csr.der(), hour, None)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("CA's own"), "{error}");
    assert_eq!(ca.status()["issued"], 0);
}

#[tokio::test]
async fn serves_its_own_names() {
    let folder = tempfile::tempdir().unwrap();
    let clock = FakeClock::new();
    let ca = open_with(folder.path(), settings(), &clock).await;
    let names = ["ca.mesh.svc".to_owned(), "127.0.0.1".into(), "::1".into()];
    let (key, renew) = ca.serving_certificate(&names).unwrap();
    key.keys_match().unwrap();
    lint(&key.cert[0]);
    assert_eq!(unix_seconds(renew), clock.now() + DAY / 2);
    verifies(&key.cert, &ca.published().borrow()).unwrap();
    let files = [("leaf", all(&key.cert))];
    let (text, _) = openssl(&["x509", "-noout", "-text", "-in", "leaf"], &files);
    for expected in [
        "X509v3 Subject Alternative Name: critical\n                DNS:ca.mesh.svc, IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1\n",
        "X509v3 Extended Key Usage: \n                TLS Web Server Authentication\n",
    ] {
        assert!(text.contains(expected), "{expected:?} in\n{text}");
    }
    for bad in [
        &[][..],
        &["".into()],
        &["a b".into()],
        &["spiffe://a/b".into()],
    ] {
        assert!(
            matches!(ca.serving_certificate(bad), Err(Refusal::Request(_))),
            "{bad:?}"
        );
    }
}

#[tokio::test]
async fn revokes_serials_identities_and_nodes() {
    let folder = tempfile::tempdir().unwrap();
    let clock = FakeClock::new();
    let ca = open_with(folder.path(), settings(), &clock).await;
    let hour = Duration::from_secs(3600);
    let api = identity("spiffe://cluster.local/ns/default/sa/api");
    let mut chains = Vec::new();
    for (identity, node) in [
        (identity(WEB), "a"),
        (identity(WEB), "b"),
        (api.clone(), "a"),
    ] {
        chains.push(ca.issue(&identity, &csr(), hour, Some(node)).await.unwrap());
    }
    let version = ca.published().borrow().version;
    let on_list = |ca: &Authority| {
        let published = ca.published().borrow().clone();
        let mut list = read_crl(&published.crls[0], &published.roots).unwrap();
        list.sort_by(|a, b| a.0.cmp(&b.0));
        list.into_iter()
            .map(|(serial, reason)| (serial, reason.as_str()))
            .collect::<Vec<_>>()
    };
    let hex = |chain: &[CertificateDer<'_>]| signer::hex(&serial(chain));

    // One certificate.
    let one = Target::Serial(serial(&chains[0]));
    assert_eq!(
        ca.revoke(one.clone(), Reason::KeyCompromise).await.unwrap(),
        1
    );
    assert_eq!(on_list(&ca), [(hex(&chains[0]), "keyCompromise")]);
    let published = ca.published().borrow().clone();
    assert_eq!(published.version, version + 1);
    assert!(
        verifies(&chains[0], &published)
            .unwrap_err()
            .contains("certificate revoked")
    );
    verifies(&chains[1], &published).unwrap();
    let record = ca.issued(&serial(&chains[0])).unwrap();
    assert!(matches!(
        ca.check(&record),
        Err(Revoked::Certificate { .. })
    ));
    let crl = [
        ("crl", pem::encode("X509 CRL", &published.crls[0])),
        ("root", all(&published.roots)),
    ];
    let (text, held) = openssl(
        &["crl", "-in", "crl", "-CAfile", "root", "-noout", "-text"],
        &crl,
    );
    assert!(
        held && text.contains("verify OK") && text.contains("Version 2 (0x1)"),
        "{text}"
    );
    for expected in [
        "X509v3 CRL Number",
        "X509v3 Authority Key Identifier",
        "Key Compromise",
    ] {
        assert!(text.contains(expected), "{expected} in\n{text}");
    }

    // A node: what it got, and what it might get.
    let node = Target::Node("a".into());
    assert_eq!(
        ca.revoke(node.clone(), Reason::PrivilegeWithdrawn)
            .await
            .unwrap(),
        2
    );
    let mut expected = [
        (hex(&chains[0]), "keyCompromise"),
        (hex(&chains[2]), "privilegeWithdrawn"),
    ];
    expected.sort();
    assert_eq!(on_list(&ca), expected);
    let error = ca.issue(&api, &csr(), hour, Some("a")).await.unwrap_err();
    assert!(
        matches!(error, Refusal::Revoked(Revoked::Node { .. })),
        "{error}"
    );
    ca.issue(&api, &csr(), hour, Some("b")).await.unwrap();

    // An identity, wherever.
    let web = Target::Identity(identity(WEB));
    assert_eq!(
        ca.revoke(web.clone(), Reason::CessationOfOperation)
            .await
            .unwrap(),
        2
    );
    let error = ca
        .issue(&identity(WEB), &csr(), hour, Some("b"))
        .await
        .unwrap_err();
    assert!(
        matches!(error, Refusal::Revoked(Revoked::Identity { .. })),
        "{error}"
    );

    // One that nobody knows.
    let unknown = Target::Serial([0xff; 16]);
    assert_eq!(
        ca.revoke(unknown.clone(), Reason::Unspecified)
            .await
            .unwrap(),
        0
    );
    let stranger = (format!("00{}", "ff".repeat(16)), "unspecified");
    assert!(on_list(&ca).contains(&stranger));

    // All of that is there after a restart, and what is published is newer.
    let before = ca.published().borrow().clone();
    let status = ca.status();
    drop(ca);
    let ca = open_with(folder.path(), settings(), &clock).await;
    let after = ca.published().borrow().clone();
    assert_eq!(
        (&after.identities, &after.nodes),
        (&before.identities, &before.nodes)
    );
    assert!(after.version > before.version);
    assert_eq!(on_list(&ca).len(), 3);
    assert_eq!(ca.status()["revoked"], status["revoked"]);
    assert_eq!(ca.status()["issued"], 4);
    let shown = std::fs::read_to_string(folder.path().join("crl.pem")).unwrap();
    assert_eq!(shown, pem::encode("X509 CRL", &after.crls[0]));

    // And back.
    for target in [one, node, web, unknown] {
        ca.unrevoke(target.clone()).await.unwrap();
        let error = ca.unrevoke(target).await.unwrap_err();
        assert!(error.to_string().contains("is not revoked"), "{error}");
    }
    assert!(on_list(&ca).is_empty());
    verifies(&chains[0], &ca.published().borrow()).unwrap();
    ca.issue(&identity(WEB), &csr(), hour, Some("a"))
        .await
        .unwrap();
    for (target, why) in [
        (Target::Node("a\n".into()), "node's name"),
        (
            Target::Identity(identity("spiffe://b/ns/c/sa/d")),
            "trust domain",
        ),
        (Target::Serial(root_serial(&ca)), "rotate the root"),
    ] {
        let error = ca.revoke(target, Reason::Unspecified).await.unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    }
}

fn root_serial(ca: &Authority) -> [u8; 16] {
    serial(&ca.published().borrow().roots)
}

#[tokio::test]
async fn lists_are_renewed_and_forget() {
    let folder = tempfile::tempdir().unwrap();
    let clock = FakeClock::new();
    let ca = open_with(folder.path(), settings(), &clock).await;
    let chain = ca
        .issue(&identity(WEB), &csr(), Duration::from_secs(3600), None)
        .await
        .unwrap();
    ca.revoke(Target::Serial(serial(&chain)), Reason::Superseded)
        .await
        .unwrap();
    let first = ca.published().borrow().clone();
    let due = ca.inner.catch_up().await.unwrap();
    assert!(
        due <= clock.now() + PRUNED_EVERY,
        "there is something to prune"
    );
    assert_eq!(*ca.published().borrow(), first, "nothing is due");
    clock.pass(DAY / 2);
    ca.inner.catch_up().await.unwrap();
    let second = ca.published().borrow().clone();
    assert_eq!(second.version, first.version + 1);
    assert_eq!(
        read_crl(&second.crls[0], &second.roots),
        Ok(Vec::new()),
        "expired ones leave"
    );
    let number = |der: &[u8]| {
        let crl = x509_parser::parse_x509_crl(der).unwrap().1;
        crl.crl_number().unwrap().clone()
    };
    assert!(number(&second.crls[0]) > number(&first.crls[0]));
    assert_eq!(ca.status()["revoked"]["serials"], json!([]));
}

#[tokio::test]
async fn rotates_the_root_over_restarts() {
    let folder = tempfile::tempdir().unwrap();
    let clock = FakeClock::new();
    let mut ca = open_with(folder.path(), settings(), &clock).await;
    let hour = Duration::from_secs(3600);
    let old = ca
        .issue(&identity(WEB), &csr(), hour, Some("a"))
        .await
        .unwrap();
    let first = ca.published().borrow().clone();
    assert_eq!((first.roots.len(), first.phase.as_str()), (1, "steady"));

    let phase = ca.rotate_root().await.unwrap();
    assert!(phase.starts_with("spreading"), "{phase}");
    let error = ca.rotate_root().await.unwrap_err();
    assert!(error.to_string().contains("under way"), "{error}");
    let spread = ca.published().borrow().clone();
    assert_eq!((spread.roots.len(), spread.crls.len()), (2, 2));
    assert_eq!(spread.roots[0], first.roots[0], "the old one signs");
    let between = ca.issue(&identity(WEB), &csr(), hour, None).await.unwrap();
    verifies(&between, &first).unwrap();
    ca.inner.catch_up().await.unwrap();
    assert_eq!(ca.status()["phase"], "spreading");

    for restart in [true, false] {
        if restart {
            drop(ca);
            ca = open_with(folder.path(), settings(), &clock).await;
            assert_eq!(ca.published().borrow().roots, spread.roots);
        }
    }
    // The server's own certificate under the old root counts, too.
    clock.pass(299);
    ca.inner.catch_up().await.unwrap();
    ca.serving_certificate(&["ca".into()]).unwrap();
    let end = clock.now() + DAY;
    assert_eq!(ca.status()["phase"], "spreading");
    clock.pass(1);
    ca.inner.catch_up().await.unwrap();
    let status = ca.status();
    assert_eq!(status["phase"], "retiring");
    assert_eq!(status["phaseEnds"], super::super::active::rfc3339(end + 60));
    let retiring = ca.published().borrow().clone();
    assert_eq!(
        retiring.roots,
        [spread.roots[1].clone(), spread.roots[0].clone()]
    );
    let new = ca.issue(&identity(WEB), &csr(), hour, None).await.unwrap();
    assert_eq!(ca.issued(&serial(&new)).unwrap().signer, 2);
    for chain in [&old, &between, &new] {
        verifies(chain, &retiring).unwrap();
    }
    // Those who have heard of the new root only, and of the new one alone.
    verifies(&new, &spread).unwrap();
    assert!(verifies(&new, &first).is_err());
    // The old root's list still works.
    ca.revoke(Target::Serial(serial(&old)), Reason::Superseded)
        .await
        .unwrap();
    let published = ca.published().borrow().clone();
    assert!(
        verifies(&old, &published)
            .unwrap_err()
            .contains("certificate revoked")
    );
    drop(ca);
    let ca = open_with(folder.path(), settings(), &clock).await;
    assert_eq!(ca.status()["phase"], "retiring");
    while clock.now() < end + 60 {
        assert_eq!(ca.published().borrow().roots.len(), 2);
        let due = ca.inner.catch_up().await.unwrap();
        assert!(due > clock.now());
        clock.pass((due - clock.now()).min(end + 60 - clock.now()));
    }
    ca.inner.catch_up().await.unwrap();
    let last = ca.published().borrow().clone();
    assert_eq!(
        (last.phase.as_str(), &last.roots[..]),
        ("steady", &spread.roots[1..])
    );
    assert_eq!(last.crls.len(), 1);
    let state = std::fs::read_to_string(folder.path().join("ca.json")).unwrap();
    assert_eq!(state.matches("PRIVATE KEY").count(), 2, "one key is left");
    let roots = folder.path().join("root-cert.pem");
    assert_eq!(std::fs::read_to_string(&roots).unwrap(), all(&last.roots));
    assert_eq!(std::fs::metadata(roots).unwrap().mode() & 0o777, 0o644);
    let mode = std::fs::metadata(folder.path().join("ca.json"))
        .unwrap()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn replaces_a_root_before_it_ends() {
    let folder = tempfile::tempdir().unwrap();
    let clock = FakeClock::new();
    let ca = open_with(folder.path(), settings(), &clock).await;
    clock.pass(800 * DAY - 1);
    ca.inner.catch_up().await.unwrap();
    assert_eq!(ca.status()["phase"], "steady");
    clock.pass(1);
    ca.inner.catch_up().await.unwrap();
    assert_eq!(ca.status()["phase"], "spreading");
    // Even one that has ended while the CA was away.
    clock.pass(5000 * DAY);
    drop(ca);
    let ca = open_with(folder.path(), settings(), &clock).await;
    ca.inner.catch_up().await.unwrap();
    ca.inner.catch_up().await.unwrap();
    let now = clock.now();
    ca.issue(&identity(WEB), &csr(), Duration::ZERO, None)
        .await
        .unwrap_err();
    assert!(now > 0);
}

#[tokio::test]
async fn keeps_up_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = settings();
    settings.root = Root::SelfSigned {
        algorithm: KeyAlgorithm::P256,
        lifetime: Duration::from_secs(DAY),
        spread: Duration::from_secs(1),
    };
    settings.max_lifetime = Duration::from_secs(10);
    let store = Arc::new(DirectoryStore::open(folder.path()).unwrap());
    let ca = Authority::open(store, settings).await.unwrap();
    let background = ca.clone();
    let task = tokio::spawn(async move { background.keep_up().await });
    let mut published = ca.published();
    ca.rotate_root().await.unwrap();
    let retiring = published.wait_for(|published| published.phase.starts_with("retiring"));
    tokio::time::timeout(Duration::from_secs(30), retiring)
        .await
        .unwrap()
        .unwrap();
    task.abort();
}

#[tokio::test]
async fn state_and_settings_have_to_agree() {
    let folder = tempfile::tempdir().unwrap();
    drop(open_with(folder.path(), settings(), &FakeClock::new()).await);
    let other = Settings {
        trust_domain: "example.org".parse().unwrap(),
        ..settings()
    };
    let error = refused(folder.path(), other).await;
    assert!(
        error.contains("cluster.local") && error.contains("example.org"),
        "{error}"
    );
    let plugged = tempfile::tempdir().unwrap();
    super::super::plugged::tests::istio(plugged.path());
    let plugged_in = Settings {
        root: Root::PluggedIn {
            directory: plugged.path().to_owned(),
        },
        ..settings()
    };
    let error = refused(folder.path(), plugged_in.clone()).await;
    assert!(error.contains("root of its own"), "{error}");
    let error = refused(
        folder.path(),
        Settings {
            root: Root::SelfSigned {
                algorithm: KeyAlgorithm::P256,
                lifetime: Duration::from_secs(DAY),
                spread: Duration::from_secs(300),
            },
            max_lifetime: Duration::from_secs(1),
            ..settings()
        },
    )
    .await;
    assert!(error.contains("at least 10 s"), "{error}");

    let second = tempfile::tempdir().unwrap();
    let ca = open_with(second.path(), plugged_in.clone(), &FakeClock::new()).await;
    let error = ca.rotate_root().await.unwrap_err().to_string();
    assert!(error.contains("plugged in"), "{error}");
    let chain = ca
        .issue(&identity(WEB), &csr(), Duration::ZERO, None)
        .await
        .unwrap();
    assert_eq!(chain.len(), 3, "leaf and two intermediates");
    lint(&chain[0]);
    let published = ca.published().borrow().clone();
    assert_eq!(published.intermediates, chain[1..]);
    let signers = [published.roots.clone(), published.intermediates.clone()].concat();
    ca.revoke(Target::Serial(serial(&chain)), Reason::Superseded)
        .await
        .unwrap();
    let crl = ca.published().borrow().crls[0].clone();
    assert_eq!(read_crl(&crl, &signers).unwrap().len(), 1);
    let (said, held) = openssl(
        &[
            "verify",
            "-x509_strict",
            "-CAfile",
            "roots",
            "-untrusted",
            "chain",
            "leaf",
        ],
        &[
            ("roots", all(&published.roots)),
            ("chain", all(&chain[1..])),
            ("leaf", all(&chain[..1])),
        ],
    );
    assert!(held, "{said}");
    let status = ca.status();
    assert_eq!(
        (&status["pluggedIn"], &status["algorithm"]),
        (&json!(true), &json!("P-256"))
    );
    drop(ca);
    let error = refused(second.path(), settings()).await;
    assert!(error.contains("was plugged in"), "{error}");
    // Another intermediate is the next signer; what the old one signed stays on a list.
    let other = tempfile::tempdir().unwrap();
    super::super::plugged::tests::istio(other.path());
    let replaced = Settings {
        root: Root::PluggedIn {
            directory: other.path().to_owned(),
        },
        ..settings()
    };
    let ca = open_with(second.path(), replaced, &FakeClock::new()).await;
    let next = ca
        .issue(&identity(WEB), &csr(), Duration::ZERO, None)
        .await
        .unwrap();
    assert_eq!(ca.issued(&serial(&next)).unwrap().signer, 2);
    let published = ca.published().borrow().clone();
    assert_eq!(
        read_crl(&published.crls[0], &published.intermediates)
            .unwrap()
            .len(),
        1
    );
}

#[tokio::test]
async fn takes_over_the_embedded_root() {
    let folder = tempfile::tempdir().unwrap();
    let domain: TrustDomain = "cluster.local".parse().unwrap();
    let embedded = || EmbeddedCa::open(folder.path(), &domain, Duration::from_secs(3600));
    let root = super::super::Issuer::trust(&embedded().unwrap())
        .current()
        .bundle
        .roots
        .clone();
    let ca = open_with(folder.path(), settings(), &FakeClock::new()).await;
    assert_eq!(ca.published().borrow().roots, root);
    let chain = ca
        .issue(&identity(WEB), &csr(), Duration::ZERO, None)
        .await
        .unwrap();
    verifies(&chain, &ca.published().borrow()).unwrap();
    drop(ca);
    // Nodes that still use the folder go on; none makes another root beside a CA.
    embedded().unwrap();
    std::fs::remove_file(folder.path().join("root.pem")).unwrap();
    let error = embedded().unwrap_err().to_string();
    assert!(error.contains("auth-daemon ca"), "{error}");
    let ca = open_with(folder.path(), settings(), &FakeClock::new()).await;
    assert_eq!(ca.published().borrow().roots, root);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let ca = open_with(folder.path(), settings(), &FakeClock::new()).await;
    let csr: Arc<[u8]> = csr().into();
    let begin = std::time::Instant::now();
    let tasks: Vec<_> = (0..5000)
        .map(|n| {
            let (ca, csr) = (ca.clone(), csr.clone());
            tokio::spawn(async move {
                let identity = identity(&format!("spiffe://cluster.local/ns/default/sa/s{n}"));
                let chain = ca
                    .issue(&identity, &csr, Duration::ZERO, Some("a"))
                    .await
                    .unwrap();
                serial(&chain)
            })
        })
        .collect();
    let mut serials = std::collections::HashSet::new();
    for task in tasks {
        serials.insert(task.await.unwrap());
    }
    println!("5000 certificates in {:?}", begin.elapsed());
    assert_eq!(serials.len(), 5000);
    drop(ca);
    let ca = open_with(folder.path(), settings(), &FakeClock::new()).await;
    assert!(serials.iter().all(|serial| ca.issued(serial).is_some()));
    assert_eq!(
        ca.revoke(Target::Node("a".into()), Reason::Unspecified)
            .await
            .unwrap(),
        5000
    );
    let published = ca.published().borrow().clone();
    assert_eq!(
        read_crl(&published.crls[0], &published.roots)
            .unwrap()
            .len(),
        5000
    );
}

/// What a CA does in a short life. Returns what it was told was done.
async fn live_through(ca: &Authority, clock: &FakeClock) -> (Vec<[u8; 16]>, bool, u32) {
    let mut issued = Vec::new();
    let mut issue = async || {
        if let Ok(chain) = ca
            .issue(&identity(WEB), &csr(), Duration::ZERO, Some("a"))
            .await
        {
            issued.push(serial(&chain));
        }
    };
    issue().await;
    let revoked = ca
        .revoke(Target::Node("b".into()), Reason::KeyCompromise)
        .await
        .is_ok();
    let mut phase = u32::from(ca.rotate_root().await.is_ok());
    clock.pass(300);
    if ca.inner.catch_up().await.is_ok() && phase == 1 {
        phase = 2;
    }
    issue().await;
    (issued, revoked, phase)
}

#[tokio::test]
async fn a_crash_between_any_two_steps_loses_nothing() {
    for steps in 0.. {
        let folder = tempfile::tempdir().unwrap();
        let clock = FakeClock::new();
        let first = open_with(folder.path(), settings(), &clock).await;
        let root = first.published().borrow().roots[0].clone();
        let version = first.published().borrow().version;
        drop(first);
        let faults = Faults::crash_after(steps);
        let disk = Disk {
            faults: faults.clone(),
        };
        let store = Arc::new(DirectoryStore::open_on(folder.path(), disk).unwrap());
        let mut done = (Vec::new(), false, 0);
        let mut shown = version;
        if let Ok(ca) = Authority::open_at(store, settings(), clock.clock()).await {
            done = live_through(&ca, &clock).await;
            shown = ca.published().borrow().version;
        }
        let ca = open_with(folder.path(), settings(), &clock).await;
        let (issued, revoked, phase) = done;
        for serial in issued {
            assert!(ca.issued(&serial).is_some(), "after {steps} steps");
        }
        let published = ca.published().borrow().clone();
        assert!(published.version > shown, "after {steps} steps");
        assert!(
            !revoked || published.nodes.len() == 1,
            "after {steps} steps"
        );
        let found = match ca.status()["phase"].as_str().unwrap() {
            "steady" => 0,
            "spreading" => 1,
            "retiring" => 2,
            other => panic!("{other}"),
        };
        assert!(
            found >= phase,
            "{found} after {steps} steps, but {phase} was told"
        );
        assert!(published.roots.contains(&root));
        let chain = ca
            .issue(&identity(WEB), &csr(), Duration::ZERO, Some("a"))
            .await
            .unwrap();
        verifies(&chain, &published).unwrap();
        let left: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.contains("draft"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
        if !faults.crashed() {
            assert!(steps > 20, "all of it was tried");
            return;
        }
    }
}

#[tokio::test]
async fn a_full_disk_stops_what_would_not_last() {
    let folder = tempfile::tempdir().unwrap();
    let clock = FakeClock::new();
    let faults = Faults::default();
    let disk = Disk {
        faults: faults.clone(),
    };
    let store = Arc::new(DirectoryStore::open_on(folder.path(), disk).unwrap());
    let ca = Authority::open_at(store, settings(), clock.clock())
        .await
        .unwrap();
    let first = ca
        .issue(&identity(WEB), &csr(), Duration::ZERO, Some("a"))
        .await
        .unwrap();
    let before = (ca.published().borrow().clone(), ca.status());
    faults.fill(true);
    for _ in 0..3 {
        let error = ca
            .issue(&identity(WEB), &csr(), Duration::ZERO, None)
            .await
            .unwrap_err();
        assert!(matches!(&error, Refusal::Store(_)), "{error}");
        assert!(
            error.to_string().contains("issued.journal") && error.to_string().contains("Make room"),
            "{error}"
        );
        let error = ca
            .revoke(Target::Node("a".into()), Reason::Unspecified)
            .await
            .unwrap_err();
        assert!(matches!(error, Refusal::Store(_)), "{error}");
        ca.rotate_root().await.unwrap_err();
    }
    assert_eq!(
        (ca.published().borrow().clone(), ca.status()),
        before,
        "nothing half-applied"
    );
    let record = ca.issued(&serial(&first)).unwrap();
    ca.check(&record).unwrap();
    faults.fill(false);
    let second = ca
        .issue(&identity(WEB), &csr(), Duration::ZERO, Some("a"))
        .await
        .unwrap();
    assert_eq!(
        ca.revoke(Target::Node("a".into()), Reason::Unspecified)
            .await
            .unwrap(),
        2
    );
    drop(ca);
    let ca = open_with(folder.path(), settings(), &clock).await;
    for chain in [&first, &second] {
        let record = ca.issued(&serial(chain)).unwrap();
        ca.check(&record).unwrap_err();
    }
}
