//! Issued certificates, checked by OpenSSL and a linter.

use super::*;

#[tokio::test]
async fn issues_certificates_that_openssl_and_lints_accept() {
    for algorithm in [
        KeyAlgorithm::P256,
        KeyAlgorithm::P384,
        KeyAlgorithm::Ed25519,
    ] {
        let folder = tempfile::tempdir().unwrap();
        let root = Root::SelfSigned(RootSettings {
            algorithm,
            ..roots()
        });
        let settings = Settings { root, ..settings() };
        let clock = FakeClock::new();
        let ca = open_with(folder.path(), settings, &clock).await;
        // Everything else in the CSR is ignored.
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params
            .subject_alt_names
            .push(SanType::URI(WEB.try_into().unwrap()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.custom_extensions =
            vec![CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0])];
        let csr = params.serialize_request(&key).unwrap();
        let hour = Duration::from_secs(3600);
        let chain = ca
            .issue(&identity(WEB), csr.der(), hour, Holder::Node("node-a"))
            .unwrap()
            .chain;
        assert_eq!(chain.len(), 1, "without the root");
        lint(&chain[0]);
        let svid = ca.verify(&chain[0]).unwrap();
        assert_eq!(svid.identity.as_str(), WEB);
        assert_eq!(svid.node.as_deref(), Some("node-a"), "in the extension");
        assert_eq!(unix_seconds(svid.not_before), clock.now() - 300);
        assert_eq!(unix_seconds(svid.not_after), clock.now() + 3600);
        let published = ca.published().borrow().clone();
        verifies(&chain, &published, clock.now()).unwrap();

        let files = [("leaf", pem::certificates(&chain))];
        let (text, _) = openssl("x509 -noout -text -in leaf", &files);
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
        let files = [("root", pem::certificates(&published.roots))];
        let (text, _) = openssl("x509 -noout -text -in root", &files);
        for expected in [
            "CA:TRUE, pathlen:0",
            "Certificate Sign, CRL Sign",
            "URI:spiffe://cluster.local\n",
        ] {
            assert!(text.contains(expected), "{expected:?} in\n{text}");
        }
        clock.pass(3601);
        assert!(ca.verify(&chain[0]).unwrap_err().contains("has expired"));
    }
}

#[tokio::test]
async fn limits_lifetimes() {
    let (_folder, clock, ca) = fresh().await;
    let lifetime = |seconds| {
        let wanted = Duration::from_secs(seconds);
        let chain = ca
            .issue(&identity(WEB), &csr(), wanted, Holder::Node(""))?
            .chain;
        Ok::<_, Refusal>(unix_seconds(svid(&chain).not_after) - clock.now())
    };
    assert_eq!(lifetime(10).unwrap(), 10);
    assert_eq!(lifetime(0).unwrap(), DAY);
    assert_eq!(lifetime(u64::MAX).unwrap(), DAY);
    assert!(matches!(lifetime(9), Err(Refusal::Request(_))));
    // Nothing outlives the root, and just before it expires nothing is issued.
    clock.pass(1000 * DAY - 100);
    assert_eq!(lifetime(0).unwrap(), 100);
    clock.pass(41);
    let error = lifetime(0).unwrap_err();
    let expected = |why: &str| why.contains("expires in 59 s");
    assert!(
        matches!(&error, Refusal::State(why) if expected(why)),
        "{error}"
    );
    clock.pass(60);
    let error = lifetime(0).unwrap_err().to_string();
    assert!(error.contains("has expired"), "{error}");
}

#[tokio::test]
async fn refuses_bad_requests() {
    let (folder, _, ca) = fresh().await;
    let issue = |identity: &str, csr: &[u8]| {
        let identity = identity.parse().unwrap();
        ca.issue(&identity, csr, Duration::ZERO, Holder::Node(""))
            .unwrap_err()
    };
    let error = issue("spiffe://example.org/ns/default/sa/web", &csr());
    assert!(matches!(error, Refusal::Request(_)));
    assert!(matches!(issue(WEB, b"rubbish"), Refusal::Request(_)));
    // The CA's own key, used by a thief.
    let json = std::fs::read(folder.path().join("ca.json")).unwrap();
    let state = CaState::from_json(&json, 0).unwrap();
    let key = signer::key_from_pem(state.signers[&1].key.as_ref().unwrap()).unwrap();
    let csr = CertificateParams::default()
        .serialize_request(&key)
        .unwrap();
    let error = issue(WEB, csr.der()).to_string();
    assert!(error.contains("CA's own"), "{error}");
}

#[tokio::test]
async fn makes_server_certificates() {
    let (_folder, clock, ca) = fresh().await;
    let names = ["ca.mesh.svc".to_owned(), "127.0.0.1".into(), "::1".into()];
    let (key, renew) = ca.server_certificate(&names).unwrap();
    key.keys_match().unwrap();
    lint(&key.cert[0]);
    assert_eq!(unix_seconds(renew), clock.now() + DAY / 2);
    verifies(&key.cert, &ca.published().borrow(), clock.now()).unwrap();
    let files = [("leaf", pem::certificates(&key.cert))];
    let (text, _) = openssl("x509 -noout -text -in leaf", &files);
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
        let refused = ca.server_certificate(bad);
        assert!(matches!(refused, Err(Refusal::Request(_))), "{bad:?}");
    }
}

#[tokio::test]
async fn verifies_only_its_own_certificates() {
    let ((_one, _, ca), (_other, _, stranger)) = (fresh().await, fresh().await);
    let foreign = issue(&stranger, "web", "a").unwrap();
    let error = ca.verify(&foreign[0]).unwrap_err();
    assert!(error.contains("not issued by this CA"), "{error}");
    let unbound = ca
        .issue(&identity(WEB), &csr(), Duration::ZERO, Holder::Node(""))
        .unwrap();
    let node = ca.verify(&unbound.chain[0]).unwrap().node;
    assert_eq!(node.as_deref(), Some(""), "the node is not known");
}
