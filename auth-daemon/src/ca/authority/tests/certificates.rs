//! What is issued, by OpenSSL and by a linter.

use super::*;

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
        verifies(&chain, &published, clock.now()).unwrap();

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
    verifies(&key.cert, &ca.published().borrow(), clock.now()).unwrap();
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let ca = open_with(folder.path(), settings(), &FakeClock::new()).await;
    let csr: Arc<[u8]> = csr().into();
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
