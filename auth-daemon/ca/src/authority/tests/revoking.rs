//! Revocation.

use super::*;

#[tokio::test]
async fn revokes_a_certificate() {
    let (_folder, clock, ca) = fresh().await;
    let chains = [
        issue(&ca, "web", "a").unwrap(),
        issue(&ca, "web", "b").unwrap(),
    ];
    let version = ca.published().borrow().version;
    let target = Target::Serial(serial(&chains[0]));
    ca.revoke(target, Reason::KeyCompromise).await.unwrap();
    assert_eq!(
        listed(&ca),
        [(serial(&chains[0]).to_string(), "keyCompromise")]
    );
    let published = ca.published().borrow().clone();
    assert_eq!(published.version, version + 1);
    let error = verifies(&chains[0], &published, clock.now()).unwrap_err();
    assert!(error.contains("certificate revoked"), "{error}");
    verifies(&chains[1], &published, clock.now()).unwrap();
    ca.verify(&chains[0][0]).unwrap_err();
    ca.verify(&chains[1][0]).unwrap();
    let files = [
        ("crl", pem::encode("X509 CRL", &published.crls[0])),
        ("root", pem::certificates(&published.roots)),
    ];
    let (text, verified) = openssl("crl -in crl -CAfile root -noout -text", &files);
    assert!(verified && text.contains("verify OK"), "{text}");
    for expected in [
        "Version 2 (0x1)",
        "X509v3 CRL Number",
        "X509v3 Authority Key Identifier",
        "Key Compromise",
    ] {
        assert!(text.contains(expected), "{expected} in\n{text}");
    }
}

#[tokio::test]
async fn a_revoked_identity_or_node_loses_what_was_issued_before_and_gets_no_more() {
    let (folder, clock, ca) = fresh().await;
    let chains = [("web", "a"), ("web", "b"), ("api", "a")]
        .map(|(account, node)| issue(&ca, account, node).unwrap());
    let valid = |ca: &Authority| chains.each_ref().map(|chain| ca.verify(&chain[0]).is_ok());

    let node = Target::Node("a".into());
    clock.pass(1);
    ca.revoke(node.clone(), Reason::PrivilegeWithdrawn)
        .await
        .unwrap();
    assert_eq!(
        valid(&ca),
        [false, true, false],
        "by the name in the certificates"
    );
    let error = issue(&ca, "api", "a").unwrap_err();
    assert!(
        matches!(error, Refusal::Revoked(Revoked::Node { .. })),
        "{error}"
    );
    issue(&ca, "api", "b").unwrap();

    let web = Target::Identity(identity(WEB));
    ca.revoke(web.clone(), Reason::CessationOfOperation)
        .await
        .unwrap();
    assert_eq!(valid(&ca), [false; 3]);
    let error = issue(&ca, "web", "b").unwrap_err();
    assert!(
        matches!(error, Refusal::Revoked(Revoked::Identity { .. })),
        "{error}"
    );

    // A restart keeps all of it, and publishes a newer version.
    let before = ca.published().borrow().clone();
    let status = ca.status();
    drop(ca);
    let ca = open_with(folder.path(), settings(), &clock).await;
    let after = ca.published().borrow().clone();
    assert_eq!(after.revoked, before.revoked);
    assert!(after.version > before.version);
    assert_eq!(ca.status().revoked, status.revoked);
    assert_eq!(valid(&ca), [false; 3]);
    let written = std::fs::read_to_string(folder.path().join("crl.pem")).unwrap();
    assert_eq!(written, pem::encode("X509 CRL", &after.crls[0]));

    for target in [node, web] {
        ca.unrevoke(target.clone()).await.unwrap();
        let error = ca.unrevoke(target).await.unwrap_err().to_string();
        assert!(error.contains("is not revoked"), "{error}");
    }
    assert_eq!(valid(&ca), [true; 3]);
    issue(&ca, "web", "a").unwrap();
}

#[tokio::test]
async fn refuses_wrong_targets() {
    let (_folder, _, ca) = fresh().await;
    let root = serial(&ca.published().borrow().roots);
    let foreign = identity("spiffe://b/ns/c/sa/d");
    for (target, why) in [
        (Target::Node("a\n".into()), "node name"),
        (Target::Identity(foreign), "trust domain"),
        (Target::Serial(root), "rotate the root"),
    ] {
        let error = ca.revoke(target, Reason::Unspecified).await.unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    }
    // An unknown serial number is revoked all the same.
    let unknown = Target::Serial(Serial([0xff; 16]));
    ca.revoke(unknown, Reason::Unspecified).await.unwrap();
    assert_eq!(
        listed(&ca),
        [(format!("00{}", "ff".repeat(16)), "unspecified")]
    );
}

#[tokio::test]
async fn renews_lists_and_drops_expired_entries() {
    let (_folder, clock, ca) = fresh().await;
    let chain = issue(&ca, "web", "a").unwrap();
    let target = Target::Serial(serial(&chain));
    ca.revoke(target, Reason::Superseded).await.unwrap();
    let first = ca.published().borrow().clone();
    ca.do_due().await.unwrap();
    assert_eq!(*ca.published().borrow(), first, "nothing is due");
    clock.pass(DAY / 2);
    ca.do_due().await.unwrap();
    let second = ca.published().borrow().clone();
    assert_eq!(second.version, first.version + 1);
    let number = |der: &[u8]| {
        let crl = x509_parser::parse_x509_crl(der).unwrap().1;
        crl.crl_number().unwrap().clone()
    };
    assert!(number(&second.crls[0]) > number(&first.crls[0]));
    assert_eq!(listed(&ca).len(), 1, "it may still be valid");
    clock.pass(DAY);
    ca.do_due().await.unwrap();
    assert!(listed(&ca).is_empty());
    assert!(ca.status().revoked.serials.is_empty());
}
