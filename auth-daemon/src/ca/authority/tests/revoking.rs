//! Revocation, as others see it.

use super::*;

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
        verifies(&chains[0], &published, clock.now())
            .unwrap_err()
            .contains("certificate revoked")
    );
    verifies(&chains[1], &published, clock.now()).unwrap();
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
    verifies(&chains[0], &ca.published().borrow(), clock.now()).unwrap();
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

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whoever_got_one_while_its_node_was_revoked_is_on_the_list() {
    let folder = tempfile::tempdir().unwrap();
    let ca = open_with(folder.path(), settings(), &FakeClock::new()).await;
    let tasks: Vec<_> = (0..400)
        .map(|_| {
            let ca = ca.clone();
            tokio::spawn(async move {
                let chain = ca
                    .issue(&identity(WEB), &csr(), Duration::ZERO, Some("a"))
                    .await;
                chain.map(|chain| signer::hex(&serial(&chain)))
            })
        })
        .collect();
    while ca.status()["issued"] == 0 {
        tokio::task::yield_now().await;
    }
    let node = Target::Node("a".into());
    ca.revoke(node, Reason::KeyCompromise).await.unwrap();
    let published = ca.published().borrow().clone();
    let list = read_crl(&published.crls[0], &published.roots).unwrap();
    let list: std::collections::HashSet<_> = list.into_iter().map(|(serial, _)| serial).collect();
    for task in tasks {
        match task.await.unwrap() {
            Ok(serial) => assert!(list.contains(&serial)),
            Err(error) => assert!(matches!(error, Refusal::Revoked(_)), "{error}"),
        }
    }
}
