//! States and settings that go together, and others.

use super::*;

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
    crate::ca::plugged::tests::istio(plugged.path());
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
    crate::ca::plugged::tests::istio(other.path());
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
    let root = crate::ca::Issuer::trust(&embedded().unwrap())
        .current()
        .bundle
        .roots
        .clone();
    let clock = FakeClock::new();
    let ca = open_with(folder.path(), settings(), &clock).await;
    assert_eq!(ca.published().borrow().roots, root);
    let chain = ca
        .issue(&identity(WEB), &csr(), Duration::ZERO, None)
        .await
        .unwrap();
    verifies(&chain, &ca.published().borrow(), clock.now()).unwrap();
    drop(ca);
    // Nodes that still use the folder go on; none makes another root beside a CA.
    embedded().unwrap();
    std::fs::remove_file(folder.path().join("root.pem")).unwrap();
    let error = embedded().unwrap_err().to_string();
    assert!(error.contains("auth-daemon ca"), "{error}");
    let ca = open_with(folder.path(), settings(), &FakeClock::new()).await;
    assert_eq!(ca.published().borrow().roots, root);
}
