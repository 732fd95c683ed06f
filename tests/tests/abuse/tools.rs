//! A public TLS tool against the daemon's listener: `openssl s_client`, with every offer that it supports.
//!
//! It is the one that can offer the tunnel's ALPN protocol, and so gets behind the first bytes. Scanners that cannot are
//! refused as plaintext, as the first case shows.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::ensure;
use mesh_tests::Result;

use crate::common::hostile::Faults;
use crate::stage::Stage;

/// Time within which the client must end: the daemon ends what does not complete a handshake after ten seconds.
const DEADLINE: Duration = Duration::from_secs(25);
const TUNNEL: u16 = 15008;

/// The options of the client besides the address.
const CASES: [&str; 19] = [
    "",
    "-alpn h2,http/1.1",
    "-alpn auth-daemon/1",
    "-alpn auth-daemon/1,h2",
    "-alpn auth-daemon/1 -tls1_2",
    "-alpn auth-daemon/1 -tls1_1 -cipher ALL:@SECLEVEL=0",
    "-alpn auth-daemon/1 -groups P-256",
    "-alpn auth-daemon/1 -groups P-521",
    "-alpn auth-daemon/1 -groups X448",
    "-alpn auth-daemon/1 -groups ffdhe2048",
    "-alpn auth-daemon/1 -ciphersuites TLS_AES_128_GCM_SHA256",
    "-alpn auth-daemon/1 -ciphersuites TLS_CHACHA20_POLY1305_SHA256",
    "-alpn auth-daemon/1 -ciphersuites TLS_AES_128_CCM_8_SHA256",
    "-alpn auth-daemon/1 -sigalgs rsa_pss_rsae_sha256",
    "-alpn auth-daemon/1 -sigalgs ed25519",
    "-alpn auth-daemon/1 -max_send_frag 512 -split_send_frag 512",
    "-alpn auth-daemon/1 -status -servername default.svc -no_ticket",
    "-alpn auth-daemon/1 -cert {certificate} -key {key}",
    "-alpn auth-daemon/1 -cert {certificate} -key {key} -read_buf 1",
];

#[test]
fn openssl_neither_crashes_nor_hangs_nor_passes_a_listener() -> Result<()> {
    let mut stage = Stage::set()?;
    let before = stage.snapshots()?;
    let outside = stage.mesh.outside().clone();
    let [certificate, key] = ["tool.pem", "tool.key"].map(|name| outside.folder().join(name));
    let subject = "-addext subjectAltName=URI:spiffe://cluster.local/ns/default/sa/attacker";
    let new = format!("req -x509 -newkey rsa:2048 -nodes -subj / {subject} -days 2");
    let mut arguments: Vec<_> = new.split(' ').map(str::to_owned).collect();
    for (option, path) in [("-out", &certificate), ("-keyout", &key)] {
        arguments.extend([option.to_owned(), path.display().to_string()]);
    }
    outside.run("openssl", arguments)?.ok()?;
    let mut faults = Faults::default();
    let mut source = 30_000;
    for port in [TUNNEL, stage.echo(&stage.target).port()] {
        for case in CASES {
            source += 1;
            let client = SocketAddr::from((stage.mesh.outside_ipv4(), source));
            let to = stage.target.at(port);
            let command = format!("s_client -bind {client} -connect {to} {case}")
                .replace("{certificate}", &certificate.display().to_string())
                .replace("{key}", &key.display().to_string());
            let started = Instant::now();
            let finished = outside.run("openssl", command.split_ascii_whitespace())?;
            ensure!(
                started.elapsed() < DEADLINE,
                "{command} hangs: {finished:?}"
            );
            let what = format!("port {port}: {case}");
            faults.expect_line(&what, &stage.far, client, ("refused", ""));
        }
    }
    faults.finish();
    stage.assert_recovered(&before)?;
    stage.measure().map(drop)
}
