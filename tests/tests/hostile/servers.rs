//! Servers that are not the one that the app dials: the app gets an error in bounded time,
//! and they receive none of its bytes.

use std::io::{self, Write};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::common::hostile::{
    ALPN, Authority, CONNECTED, Faults, Peer, Presented, frame, self_signed, server_config, spiffe,
};
use crate::common::servers::{FIRST_PORT, Leaks, case, hold, leak, mesh, no_leaks, run, unharmed};
use mesh_tests::{InProcess, Mesh, OpensslServer, PodSpec, Result, ServiceSpec, Snapshot};
use rcgen::{BasicConstraints, ExtendedKeyUsagePurpose, IsCa, date_time_ymd};
use socket2::SockRef;

#[test]
fn app_gets_an_error_from_servers_without_tls() -> Result<()> {
    let silent = ("refused", "answer");
    let cases = vec![
        case(
            "closes right away",
            ("refused", "broke during the handshake"),
            |_| Ok(()),
        ),
        case("resets right away", ("refused", "reset by peer"), |tcp| {
            SockRef::from(&tcp).set_linger(Some(Duration::ZERO))
        }),
        case("says nothing", silent, |tcp| hold(&tcp)),
        case("says HTTP", ("refused", "does not speak TLS"), |mut tcp| {
            tcp.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
            hold(&tcp)
        }),
        case(
            "sends noise",
            ("refused", "does not speak TLS"),
            |mut tcp| {
                tcp.write_all(&[0xa5; 1 << 16])?;
                hold(&tcp)
            },
        ),
        case("begins a record and stops", silent, |mut tcp| {
            tcp.write_all(&[22, 3, 3, 0, 200, 2, 0])?;
            hold(&tcp)
        }),
        case(
            "sends a ServerHello of 16 MiB",
            ("refused", "too large"),
            |mut tcp| {
                let mut record = vec![22, 3, 3, 0x40, 0, 2, 0xff, 0xff, 0xff];
                record.resize(5 + 0x4000, 0);
                while tcp.write_all(&record).is_ok() {
                    record[5] = 0;
                }
                Ok(())
            },
        ),
        case("alerts", ("refused", "refuses the handshake"), |mut tcp| {
            tcp.write_all(&[21, 3, 3, 0, 2, 2, 40])?;
            hold(&tcp)
        }),
        case("one byte a second", silent, |mut tcp| {
            for byte in [22, 3, 3, 0, 100].into_iter().cycle().take(15) {
                tcp.write_all(&[byte])?;
                thread::sleep(Duration::from_secs(1));
            }
            Ok(())
        }),
    ];
    let (mesh, daemon, _) = mesh()?;
    let before = Snapshot::take(&daemon, &[mesh.pod("client").place()])?;
    let mut faults = Faults::default();
    // The kernel accepts the connection, and the app never reads it.
    let web = mesh.pod("web");
    let _listener = web.listen(web.at(FIRST_PORT - 1))?;
    let unserved = (FIRST_PORT - 1, "is never accepted", silent);
    let tls12 = OpensslServer::start(&web, FIRST_PORT - 2, &["-tls1_2", "-www"])?;
    let old = (
        FIRST_PORT - 2,
        "speaks TLS 1.2",
        ("refused", "refuses the handshake"),
    );
    let nobody = (
        FIRST_PORT - 3,
        "is not there",
        ("refused", "Connection refused"),
    );
    run(&mesh, &daemon, cases, &[unserved, old, nobody], &mut faults)?;
    drop(tls12);
    unharmed(&mesh, daemon, &before);
    faults.finish();
    Ok(())
}

#[test]
fn server_with_another_certificate_receives_nothing() -> Result<()> {
    let (mesh, daemon, stolen) = mesh()?;
    let before = Snapshot::take(&daemon, &[mesh.pod("client").place()])?;
    let web = spiffe("web");
    let web = web.as_str();
    let another = Authority::another()?;
    let (refused, leaks) = ("refused", Leaks::default());
    let presenting = |what, reason, presented: Presented, alpn: &'static [&'static [u8]]| {
        let leaks = Arc::clone(&leaks);
        case(what, (refused, reason), move |tcp| {
            let config = server_config(&presented, alpn).map_err(io::Error::other)?;
            let mut peer = Peer::server(tcp, config)?;
            // Follows the protocol, to receive as much as it can.
            while let Some((kind, payload)) = peer.frame()? {
                leak(&leaks, what, kind, &payload);
                peer.send(&frame(CONNECTED, b""))?;
            }
            Ok(())
        })
    };
    let ours: &[&[u8]] = &[ALPN];
    let cases = vec![
        presenting(
            "another account",
            "presents spiffe://cluster.local/ns/default/sa/evil, but may only be spiffe://cluster.local/ns/default/sa/web",
            stolen.mint("evil")?,
            ours,
        ),
        presenting(
            "another root",
            "not issued by its trust domain's CA",
            another.mint("web")?,
            ours,
        ),
        presenting(
            "self-signed",
            "not issued by its trust domain's CA",
            self_signed("web")?,
            ours,
        ),
        presenting(
            "another trust domain",
            "of another trust domain",
            stolen.mint_with(&["spiffe://elsewhere.example/ns/default/sa/web"], |_| {})?,
            ours,
        ),
        presenting(
            "expired",
            "has expired",
            stolen.mint_with(&[web], |p| p.not_after = date_time_ymd(2021, 1, 1))?,
            ours,
        ),
        presenting(
            "not yet valid",
            "not valid yet",
            stolen.mint_with(&[web], |p| p.not_before = date_time_ymd(2080, 1, 1))?,
            ours,
        ),
        presenting(
            "two URI SANs",
            "2 URI SANs",
            stolen.mint_with(&[web, &spiffe("evil")], |_| {})?,
            ours,
        ),
        presenting(
            "no URI SAN",
            "0 URI SANs",
            stolen.mint_with(&[], |_| {})?,
            ours,
        ),
        presenting(
            "CA:TRUE",
            "is a CA's",
            stolen.mint_with(&[web], |p| {
                p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)
            })?,
            ours,
        ),
        presenting(
            "clientAuth only",
            "extended key usage",
            stolen.mint_with(&[web], |p| {
                p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]
            })?,
            ours,
        ),
        presenting(
            "no ALPN",
            "does not speak auth-daemon/1",
            stolen.mint("web")?,
            &[],
        ),
        presenting(
            "another ALPN",
            "refuses the handshake",
            stolen.mint("web")?,
            &[b"h2"],
        ),
    ];
    let mut faults = Faults::default();
    run(&mesh, &daemon, cases, &[], &mut faults)?;
    no_leaks(&leaks, &mut faults);
    unharmed(&mesh, daemon, &before);
    faults.finish();
    Ok(())
}

#[test]
fn hostile_endpoints_of_a_service_are_skipped() -> Result<()> {
    let server = |name: &str, node: &str| {
        let pod = PodSpec::new(name).on(node).service_account("web");
        pod.label("app", "web")
    };
    let mesh = Mesh::builder()
        .node("a")
        .node("b")
        .node("c")
        .pod(PodSpec::new("client").on("a").service_account("client"))
        .pod(server("hostile", "b"))
        .pod(server("frozen", "b"))
        .pod(server("honest", "c"))
        .service(
            ServiceSpec::new("web")
                .selector("app", "web")
                .address("10.96.0.7")
                .port(80, 8080),
        )
        .start()?;
    let daemon = mesh.node("a").start_daemon()?;
    daemon.wait_enrolled(&["default/client"])?;
    let honest_daemon = mesh.node("c").start_daemon()?;
    honest_daemon.wait_enrolled(&["default/honest"])?;
    let leaks = Leaks::default();
    let evil = Authority::stolen(&mesh.node("a").ca_folder())?.mint("evil")?;
    let pod = mesh.pod("hostile");
    let hostile = InProcess::start(&pod, pod.at(8080), {
        let leaks = Arc::clone(&leaks);
        move |tcp, _| {
            let Ok(config) = server_config(&evil, &[ALPN]) else {
                return;
            };
            let Ok(mut peer) = Peer::server(tcp, config) else {
                return;
            };
            while let Ok(Some((kind, payload))) = peer.frame() {
                leak(&leaks, "the hostile endpoint", kind, &payload);
            }
        }
    })?;
    // The kernel establishes connections, and no app answers.
    let _frozen = mesh.pod("frozen").listen(mesh.pod("frozen").at(8080))?;
    let _nginx = mesh_tests::Nginx::start(&mesh.pod("honest"), 8080, "honest")?;
    // The daemon itself gives up after ten seconds.
    let curl = "-sS -m 60 --parallel --parallel-max 40 -w \\n http://10.96.0.7/[1-40]";
    let answers = mesh
        .pod("client")
        .run("curl", curl.split(' '))?
        .ok()?
        .stdout;
    // Parallel transfers interleave their lines.
    let answers: String = answers.split_whitespace().collect();
    assert_eq!(answers, "honest".repeat(40));
    let mut faults = Faults::default();
    no_leaks(&leaks, &mut faults);
    faults.finish();
    drop(hostile);
    Ok(())
}
