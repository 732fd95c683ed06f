//! Callers with invalid certificates: each is refused, and the log has the reason.

use crate::common::hostile::{
    ALPN, Authority, CONNECTED, Faults, Peer, Presented, RESET, client_config, connect_frame, dial,
    lines_of, self_signed, spiffe, uri,
};
use crate::common::stage::{HTTP, Stage, WITNESS};
use mesh_tests::{DaemonOptions, Result, TIMEOUT, eventually_ok};
use rcgen::{
    BasicConstraints, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType, date_time_ymd,
};
use serde_json::json;

/// The code of a RESET.
const FORBIDDEN: u8 = 4;

#[test]
fn only_valid_certificates_are_admitted() -> Result<()> {
    let mut stage = Stage::set()?;
    let before = stage.snapshot()?;
    let mut faults = Faults::default();
    for (what, certificate, reason) in &cases(&stage.authority)? {
        let mut peer = stage.outsider_as(HTTP, certificate.as_ref())?;
        let client = peer.local();
        // The daemon may have refused it already.
        let _ = peer.send(&connect_frame(stage.web().at(HTTP), client));
        let ended = peer.end();
        faults.check(ended.frames.is_empty() && ended.error.is_some(), || {
            format!("{what}: the daemon answers: {ended:?}")
        });
        faults.expect_line(what, &stage.daemon, client, ("refused", reason));
        let line = &lines_of(&stage.daemon, client)?[0];
        faults.check(line["server_identity"] == spiffe("web"), || {
            format!("{what}: no server's identity: {line}")
        });
    }
    faults.finish();
    stage.assert_unharmed(&before, 16 * 1024);
    Ok(())
}

#[test]
fn foreign_ca_issues_only_its_own_trust_domains_names() -> Result<()> {
    let mut stage = Stage::set()?;
    let (far, second) = (Authority::foreign()?, Authority::foreign()?);
    let mut entries = Vec::new();
    for (name, (_, root)) in [("far.example", &far), ("second.example", &second)] {
        let file = stage.mesh.node("b").place().folder().join(name);
        std::fs::write(&file, root)?;
        entries.push(json!({"trustDomain": name, "bundleFile": file}));
    }
    stage
        .daemon
        .edit_config(|config| config["federation"] = entries.into())?;
    let own_name = spiffe("web");
    let [far_name, second_name] =
        ["far", "second"].map(|name| format!("spiffe://{name}.example/ns/default/sa/web"));
    let call = |issuer: &Authority, name: &str| -> Result<_> {
        let certificate = issuer.mint_with(&[name], |_| {})?;
        let mut peer = stage.outsider_as(HTTP, Some(&certificate))?;
        let client = peer.local();
        let _ = peer.send(&connect_frame(stage.web().at(HTTP), client));
        Ok((peer, client))
    };
    for (issuer, name) in [(&far.0, &far_name), (&second.0, &second_name)] {
        eventually_ok(TIMEOUT, &format!("{name} to be admitted"), || {
            let answer = call(issuer, name)?.0.frame();
            anyhow::ensure!(matches!(answer, Ok(Some((CONNECTED, _)))), "{answer:?}");
            Ok(())
        })?;
    }
    let before = stage.snapshot()?;
    let mut faults = Faults::default();
    for (what, issuer, name) in [
        ("a foreign CA issues our name", &far.0, &own_name),
        ("a foreign CA issues another's name", &far.0, &second_name),
        ("another foreign CA issues its name", &second.0, &far_name),
        ("our CA issues a foreign name", &stage.authority, &far_name),
    ] {
        let (peer, client) = call(issuer, name)?;
        let ended = peer.end();
        faults.check(ended.frames.is_empty() && ended.error.is_some(), || {
            format!("{what}: the daemon answers: {ended:?}")
        });
        let reason = "not issued by its trust domain's CA";
        faults.expect_line(what, &stage.daemon, client, ("refused", reason));
    }
    faults.finish();
    stage.assert_unharmed(&before, 16 * 1024);
    Ok(())
}

type Case = (&'static str, Option<Presented>, &'static str);

fn cases(stolen: &Authority) -> Result<Vec<Case>> {
    let web = spiffe("web");
    let web = web.as_str();
    let other_root = Authority::another()?;
    let mut cases: Vec<Case> = vec![
        ("no certificate", None, "presents no certificate"),
        (
            "another root",
            Some(other_root.mint("web")?),
            "not issued by its trust domain's CA",
        ),
        (
            "self-signed",
            Some(self_signed("web")?),
            "not issued by its trust domain's CA",
        ),
        (
            "another trust domain",
            Some(stolen.mint_with(&["spiffe://elsewhere.example/ns/default/sa/web"], |_| {})?),
            "spiffe://elsewhere.example/ns/default/sa/web is of another trust domain",
        ),
        (
            "expired",
            Some(stolen.mint_with(&[web], |p| p.not_after = date_time_ymd(2021, 1, 1))?),
            "has expired",
        ),
        (
            "not yet valid",
            Some(stolen.mint_with(&[web], |p| p.not_before = date_time_ymd(2080, 1, 1))?),
            "not valid yet",
        ),
        (
            "two URI SANs",
            Some(stolen.mint_with(&[web, &spiffe("admin")], |_| {})?),
            "2 URI SANs",
        ),
        (
            "the same URI SAN twice",
            Some(stolen.mint_with(&[web, web], |_| {})?),
            "2 URI SANs",
        ),
        ("no SAN", Some(stolen.mint_with(&[], |_| {})?), "0 URI SANs"),
        (
            "a DNS SAN only",
            Some(stolen.mint_with(&[], |p| {
                p.subject_alt_names = vec![SanType::DnsName("web".try_into().expect("ASCII"))];
            })?),
            "0 URI SANs",
        ),
        (
            "CA:TRUE",
            Some(stolen.mint_with(&[web], |p| {
                p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            })?),
            "is a CA's",
        ),
        (
            "keyCertSign",
            Some(stolen.mint_with(&[web], |p| p.key_usages.push(KeyUsagePurpose::KeyCertSign))?),
            "keyCertSign",
        ),
        (
            "cRLSign",
            Some(stolen.mint_with(&[web], |p| p.key_usages.push(KeyUsagePurpose::CrlSign))?),
            "cRLSign",
        ),
        (
            "no key usage",
            Some(stolen.mint_with(&[web], |p| p.key_usages.clear())?),
            "digitalSignature",
        ),
        (
            "serverAuth only",
            Some(stolen.mint_with(&[web], |p| {
                p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            })?),
            "extended key usage",
        ),
    ];
    // A workload's certificate may not sign others.
    let (workload, certificate) = stolen.below()?;
    let mut presented = workload.mint("web")?;
    presented.chain.push(certificate);
    cases.push(("signed by a workload", Some(presented), "not issued"));
    // A certificate without its key proves nothing.
    let mut stranger = stolen.mint("web")?;
    stranger.key_pem = stolen.mint("web")?.key_pem;
    cases.push(("another's certificate", Some(stranger), "key"));
    for (what, id) in MALFORMED {
        let certificate = stolen.mint_with(&[], |p| {
            p.subject_alt_names = vec![uri(id).expect("ASCII")];
        })?;
        cases.push((what, Some(certificate), "is not the SPIFFE ID"));
    }
    let long = format!("{web}{}", "x".repeat(3000));
    cases.push((
        "an endless SPIFFE ID",
        Some(stolen.mint_with(&[&long], |_| {})?),
        "longer than 2048 bytes",
    ));
    Ok(cases)
}

const MALFORMED: [(&str, &str); 9] = [
    ("another scheme", "https://cluster.local/ns/default/sa/web"),
    ("capitals", "SPIFFE://cluster.local/ns/default/sa/web"),
    ("no service account", "spiffe://cluster.local/ns/default"),
    (
        "a longer path",
        "spiffe://cluster.local/ns/default/sa/web/x",
    ),
    ("a query", "spiffe://cluster.local/ns/default/sa/web?x"),
    ("an escape", "spiffe://cluster.local/ns/default/sa/%77eb"),
    ("dots", "spiffe://cluster.local/ns/../sa/web"),
    ("a port", "spiffe://cluster.local:1/ns/default/sa/web"),
    (
        "a line for the log",
        "spiffe://cluster.local/ns/default/sa/web\n{\"target\":\"access\",\"result\":\"ok\"}\x1b[2J",
    ),
];

#[test]
fn pod_address_requires_the_identity_of_the_pod() -> Result<()> {
    let mut stage = Stage::set()?;
    let other = stage.mesh.pod("other");
    let web = stage.web();
    let before = stage.snapshot()?;
    let mut faults = Faults::default();
    for server in [web.at(HTTP), web.at6(HTTP)] {
        // The pod's own identity is admitted; its neighbour's is not, although it is genuine.
        for (account, admitted) in [("other", true), ("client", false)] {
            let tcp = dial(&other, server)?;
            let certificate = stage.authority.mint(account)?;
            let mut peer = Peer::client(tcp, client_config(Some(&certificate), &[ALPN])?)?;
            let client = peer.local();
            peer.send(&connect_frame(server, client))?;
            let answer = peer.frame()?;
            if admitted {
                assert_eq!(answer, Some((CONNECTED, vec![])), "{account} at {server}");
                continue;
            }
            let Some((RESET, payload)) = answer else {
                panic!("{account} at {server}: {answer:?}");
            };
            assert_eq!(payload[0], FORBIDDEN);
            let ended = peer.end();
            assert!(ended.frames.is_empty(), "{ended:?}");
            let (is, says) = (spiffe("other"), spiffe(account));
            let reason = format!("address of pod default/other, which is {is}, not {says}");
            faults.expect_line("an impostor", &stage.daemon, client, ("refused", &reason));
            let line = &lines_of(&stage.daemon, client)?[0];
            assert_eq!(line["client_identity"], says, "{line:#}");
            assert_eq!(line["server_identity"], spiffe("web"), "{line:#}");
        }
    }
    faults.finish();
    stage.assert_unharmed(&before, 16 * 1024);
    Ok(())
}

#[test]
fn permissive_tunnel_still_requires_a_certificate() -> Result<()> {
    let mut stage = Stage::set_with(&DaemonOptions::default().permissive())?;
    let other = stage.mesh.pod("other");
    let before = stage.snapshot()?;
    let mut faults = Faults::default();
    let strangers = [
        ("no certificate", None, "presents no certificate"),
        (
            "another root",
            Some(Authority::another()?.mint("other")?),
            "not issued",
        ),
        (
            "another's identity",
            Some(stage.authority.mint("client")?),
            "is the address of pod",
        ),
    ];
    for (what, certificate, reason) in strangers {
        // A ClientHello of the tunnel never reaches the app, whatever the result.
        let server = stage.web().at(WITNESS);
        let tcp = dial(&other, server)?;
        let client = tcp.local_addr()?;
        let mut peer = Peer::client(tcp, client_config(certificate.as_ref(), &[ALPN])?)?;
        let _ = peer.send(&connect_frame(server, client));
        let ended = peer.end();
        faults.check(ended.frames.iter().all(|(kind, _)| *kind == RESET), || {
            format!("{what}: the daemon answers: {ended:?}")
        });
        faults.expect_line(what, &stage.daemon, client, ("refused", reason));
        faults.check(!stage.was_witnessed(client), || {
            format!("{what}: the app was reached")
        });
    }
    faults.finish();
    stage.assert_unharmed(&before, 16 * 1024);
    Ok(())
}
