//! Which states and settings fit together.

use super::*;

pub(super) fn intermediate(directory: &Path) -> Settings {
    crate::intermediate::tests::istio(directory);
    Settings {
        root: Root::Intermediate(directory.to_owned()),
        ..settings()
    }
}

#[tokio::test]
async fn refuses_settings_that_do_not_fit_the_state() {
    let folder = tempfile::tempdir().unwrap();
    drop(open_with(folder.path(), settings(), &FakeClock::new()).await);
    let other = Settings {
        trust_domain: "example.org".parse().unwrap(),
        ..settings()
    };
    let error = refused(folder.path(), other).await;
    assert!(error.contains("cluster.local") && error.contains("example.org"));
    let files = tempfile::tempdir().unwrap();
    let error = refused(folder.path(), intermediate(files.path())).await;
    assert!(error.contains("root of its own"), "{error}");
    let short = Settings {
        max_lifetime: Duration::from_secs(1),
        ..settings()
    };
    let error = refused(folder.path(), short).await;
    assert!(error.contains("at least 10s"), "{error}");
}

#[tokio::test]
async fn signs_as_an_intermediate() {
    let (folder, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let settings_with_files = intermediate(files.path());
    // After the certificates, which are valid from now on.
    let clock = FakeClock::new();
    let ca = open_with(folder.path(), settings_with_files, &clock).await;
    let error = ca.rotate_root().await.unwrap_err().to_string();
    assert!(error.contains("intermediate"), "{error}");
    let chain = issue(&ca, "web", "a").unwrap();
    assert_eq!(chain.len(), 3, "leaf and two intermediates");
    lint(&chain[0]);
    ca.verify(&chain[0]).unwrap();
    let published = ca.published().borrow().clone();
    assert_eq!(published.intermediates, chain[1..]);
    let target = Target::Serial(serial(&chain));
    ca.revoke(target, Reason::Superseded).await.unwrap();
    assert_eq!(listed(&ca).len(), 1);
    let (text, verified) = openssl(
        "verify -x509_strict -CAfile roots -untrusted chain leaf",
        &[
            ("roots", pem::certificates(&published.roots)),
            ("chain", pem::certificates(&chain[1..])),
            ("leaf", pem::certificates(&chain[..1])),
        ],
    );
    assert!(verified, "{text}");
    let status = serde_json::to_value(ca.status()).unwrap();
    assert_eq!(
        (&status["pluggedIn"], &status["algorithm"]),
        (&json!(true), &json!("P-256"))
    );
    drop(ca);
    let error = refused(folder.path(), settings()).await;
    assert!(error.contains("of an intermediate"), "{error}");
    // Another intermediate becomes the next signer, and the revoked serial number stays on the list.
    let other = tempfile::tempdir().unwrap();
    clock.pass(2 * DAY);
    let ca = open_with(folder.path(), intermediate(other.path()), &clock).await;
    assert_eq!(listed(&ca).len(), 1);
    ca.verify(&issue(&ca, "web", "a").unwrap()[0]).unwrap();
    assert!(ca.verify(&chain[0]).is_err(), "of the former intermediate");
}

#[tokio::test]
async fn takes_over_the_embedded_root() {
    let folder = tempfile::tempdir().unwrap();
    let domain: TrustDomain = "cluster.local".parse().unwrap();
    let embedded = || EmbeddedCa::open(folder.path(), &domain, Duration::from_secs(3600));
    let root = embedded().unwrap().trust().current().bundle.roots.clone();
    let clock = FakeClock::new();
    let ca = open_with(folder.path(), settings(), &clock).await;
    assert_eq!(ca.published().borrow().roots, root);
    let chain = issue(&ca, "web", "a").unwrap();
    verifies(&chain, &ca.published().borrow(), clock.now()).unwrap();
    drop(ca);
    // Nodes that still use the directory continue, but none makes another root beside a CA.
    embedded().unwrap();
    std::fs::remove_file(folder.path().join("root.pem")).unwrap();
    let error = embedded().unwrap_err().to_string();
    assert!(error.contains("auth-daemon ca"), "{error}");
    let ca = open_with(folder.path(), settings(), &FakeClock::new()).await;
    assert_eq!(ca.published().borrow().roots, root);
}
