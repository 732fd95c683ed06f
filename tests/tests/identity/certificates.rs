//! The daemon's certificates as OpenSSL sees them, and the folder of the CA that signs them.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::common::hostile::Authority;
use mesh_tests::{Context, DaemonOptions, Finished, Mesh, PodSpec, Result, TIMEOUT};

fn mesh() -> Result<Mesh> {
    Mesh::builder()
        .node("a")
        .pod(PodSpec::new("web").on("a").service_account("web"))
        .start()
}

#[test]
fn openssl_verifies_the_certificate() -> Result<()> {
    let mesh = mesh()?;
    let daemons = mesh.start_daemons()?;
    let ca = mesh.node("a").ca_folder();
    let outside = mesh.outside();
    let folder = outside.folder();
    // s_client presents a certificate, because it would be refused without one.
    let own = Authority::stolen(&ca)?.mint("outsider")?;
    fs::write(folder.join("own.key"), &own.key_pem)?;
    fs::write(folder.join("own.der"), &own.chain[0])?;
    let to = mesh.pod("web").at(8080).to_string();
    let root = ca.join("root-cert.pem").display().to_string();
    let s_client =
        "s_client -showcerts -alpn auth-daemon/1 -cert own.der -certform DER -key own.key -connect";
    let arguments = s_client.split(' ').chain([&*to, "-CAfile", &root]);
    let shown = outside.run("openssl", arguments)?;
    let text = &shown.stdout;
    for expected in [
        "Verification: OK",
        "New, TLSv1.3, Cipher is TLS_",
        "ALPN protocol: auth-daemon/1",
        "Acceptable client certificate CA names",
    ] {
        let wanted = expected != "Acceptable client certificate CA names";
        assert_eq!(
            text.contains(expected),
            wanted,
            "{expected}: {text} {}",
            shown.stderr
        );
    }
    let sent = text.matches("BEGIN CERTIFICATE").count();
    assert_eq!(sent, 1, "the leaf alone, without the root: {text}");
    let begin = text.find("-----BEGIN").context("no certificate")?;
    let end = text.find("-----END CERTIFICATE-----").context("no end")? + 26;
    fs::write(folder.join("leaf.pem"), &text[begin..end])?;
    for purpose in ["sslserver", "sslclient"] {
        let verify = [
            "verify",
            "-x509_strict",
            "-purpose",
            purpose,
            "-CAfile",
            &root,
            "leaf.pem",
        ];
        outside.run("openssl", verify)?.ok()?;
    }
    let x509 = |arguments: &str| -> Result<String> {
        let arguments = format!("x509 -in leaf.pem -noout {arguments}");
        Ok(outside.run("openssl", arguments.split(' '))?.ok()?.stdout)
    };
    let names = x509("-ext subjectAltName")?;
    let uri = "URI:spiffe://cluster.local/ns/default/sa/web";
    assert_eq!(names.lines().nth(1).map(str::trim), Some(uri), "{names}");
    assert_eq!(names.lines().count(), 2, "{names}");
    // RFC 5280 §4.2.1.6: with an empty subject, the names are critical.
    assert!(names.contains("critical"), "{names}");
    assert_eq!(x509("-subject")?.trim(), "subject=");
    let usage = x509("-ext keyUsage")?;
    assert_eq!(
        usage.lines().nth(1).map(str::trim),
        Some("Digital Signature"),
        "{usage}"
    );
    assert!(usage.contains("critical"), "{usage}");
    let extended = x509("-ext extendedKeyUsage")?;
    let both = "TLS Web Server Authentication, TLS Web Client Authentication";
    assert_eq!(
        extended.lines().nth(1).map(str::trim),
        Some(both),
        "{extended}"
    );
    let basic = x509("-ext basicConstraints")?;
    assert_eq!(
        basic.lines().nth(1).map(str::trim),
        Some("CA:FALSE"),
        "{basic}"
    );
    let all = x509("-text")?;
    for expected in [
        "NIST CURVE: P-256",
        "Signature Algorithm: ecdsa-with-SHA256",
    ] {
        assert!(all.contains(expected), "{expected}: {all}");
    }
    // Valid for 24 hours from now, and backdated to allow for clock skew.
    assert_eq!(
        x509("-checkend 86000")?.trim(),
        "Certificate will not expire"
    );
    assert!(
        outside
            .run(
                "openssl",
                "x509 -in leaf.pem -noout -checkend 86500".split(' ')
            )?
            .code()
            == Some(1)
    );
    let serial = x509("-serial")?.trim().to_lowercase();
    let status = daemons[0].status()?;
    assert_eq!(serial, format!("serial={}", status.certificates[0].serial));
    Ok(())
}

#[test]
fn root_key_is_readable_by_its_owner_only() -> Result<()> {
    let mesh = mesh()?;
    let ca = mesh.node("a").ca_folder();
    let root = ca.join("root.pem");
    drop(mesh.start_daemons()?);
    let mode =
        |path: &Path| -> Result<u32> { Ok(fs::metadata(path)?.permissions().mode() & 0o777) };
    assert_eq!(mode(&root)?, 0o600);
    assert_eq!(mode(&ca.join("root-cert.pem"))?, 0o644);
    let certificate = fs::read_to_string(ca.join("root-cert.pem"))?;
    assert!(!certificate.contains("PRIVATE"), "the key is in the open");
    let good = fs::read(&root)?;

    for mode in [0o644, 0o640, 0o604, 0o660] {
        fs::set_permissions(&root, Permissions::from_mode(mode))?;
        let why = refusal(&mesh, DaemonOptions::default())?;
        for expected in [
            root.display().to_string(),
            format!("{mode:03o}"),
            "chmod 600".into(),
        ] {
            assert!(why.contains(&expected), "{mode:o}: {expected}: {why}");
        }
    }
    fs::set_permissions(&root, Permissions::from_mode(0o600))?;
    // With write access to the folder, anyone could replace the root.
    for mode in [0o777, 0o730] {
        fs::set_permissions(&ca, Permissions::from_mode(mode))?;
        let why = refusal(&mesh, DaemonOptions::default())?;
        assert!(why.contains(&ca.display().to_string()), "{mode:o}: {why}");
    }
    fs::set_permissions(&ca, Permissions::from_mode(0o700))?;
    for (what, bytes) in [
        ("empty", &b""[..]),
        ("cut", &good[..good.len() / 2]),
        ("noise", b"\x00\xff"),
    ] {
        fs::write(&root, bytes)?;
        let why = refusal(&mesh, DaemonOptions::default())?;
        assert!(why.contains(&root.display().to_string()), "{what}: {why}");
    }
    fs::write(&root, &good)?;
    mesh.start_daemons()?;
    assert_eq!(fs::read(&root)?, good, "another root");
    Ok(())
}

#[test]
fn rejects_root_of_another_trust_domain() -> Result<()> {
    let mesh = mesh()?;
    let options = DaemonOptions::default().trust_domain("elsewhere.example");
    drop(mesh.start_daemons()?);
    let why = refusal(&mesh, options.clone())?;
    for expected in ["elsewhere.example", "spiffe://cluster.local", "root.pem"] {
        assert!(why.contains(expected), "{expected}: {why}");
    }
    // With its own folder the daemon starts, and its pods belong to that trust domain.
    let own: PathBuf = mesh.node("a").folder().join("another-ca");
    let daemons = mesh.start_daemons_with(&options.ca_folder(own))?;
    let identity = &daemons[0].status()?.pods[0].identity;
    assert_eq!(identity, "spiffe://elsewhere.example/ns/default/sa/web");
    Ok(())
}

/// Starts the daemon, which must exit with an error. Returns the error.
fn refusal(mesh: &Mesh, options: DaemonOptions) -> Result<String> {
    let mut daemon = mesh.node("a").spawn_daemon(options)?;
    let status = daemon.process().wait(TIMEOUT)?;
    let log = daemon.log_text();
    assert!(!status.success(), "{log}");
    assert!(!log.contains("panicked") && !log.contains("BEGIN"), "{log}");
    Ok(log)
}

#[test]
fn refuses_peers_of_another_trust_domain() -> Result<()> {
    let mesh = Mesh::builder()
        .node("a")
        .node("b")
        .pod(PodSpec::new("client").on("a").service_account("client"))
        .pod(PodSpec::new("web").on("b").service_account("web"))
        .start()?;
    let a = mesh.node("a").start_daemon()?;
    let elsewhere = DaemonOptions::default()
        .trust_domain("elsewhere.example")
        .ca_folder(mesh.node("b").folder().join("another-ca"));
    let b = mesh.node("b").start_daemon_with(elsewhere)?;
    a.wait_enrolled(&["default/client"])?;
    b.wait_enrolled(&["default/web"])?;
    let _nginx = mesh_tests::Nginx::start(&mesh.pod("web"), 8080, "web")?;
    let url = format!("http://{}/", mesh.pod("web").at(8080));
    let answer: Finished = mesh.pod("client").run("curl", ["-sS", "-m", "15", &url])?;
    assert!(matches!(answer.code(), Some(7 | 55 | 56)), "{answer:?}");
    for daemon in [&a, &b] {
        let line =
            daemon.wait_for_access("a refusal", TIMEOUT, |line| line["result"] == "refused")?;
        let reason = line["reason"].as_str().unwrap_or_default();
        // One side found the error, and the other received an alert.
        assert!(
            reason.contains("certificate") || reason.contains("Certificate"),
            "{line:#}"
        );
    }
    Ok(())
}
