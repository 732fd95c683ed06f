//! An app that connects to the mesh is captured however its socket was made, and has the identity of the netns that the
//! socket lives in: not of the process that uses it, and not of the addresses that it names.
//!
//! Unix sockets carry no TCP. They are bound to one node, an abstract one even to one netns, and an app that accepts requests
//! on one acts for its caller as it does on any other channel.

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;

use anyhow::ensure;
use mesh_tests::{
    App, Capture, DaemonOptions, Place, Pod, PodSpec, Process, Result, TIMEOUT, eventually,
    eventually_ok, pod_app,
};
use nix::sched::{CloneFlags, setns};
use serde_json::Value;

use crate::common::pair::{Pair, builder};

const PORT: u16 = 7;
/// As the daemon marks its deliveries.
const DAEMONS_MARK: u32 = 0x6d54_4c53;
const MARKER: &str = "marker-of-an-odd-socket";

/// A pair with an echo server in `web`, and a pod `other` beside `client` with another account.
struct Stage {
    echo: App,
    capture: Capture,
    other: Pod,
    pair: Pair,
}

impl Stage {
    fn set() -> Result<Self> {
        let pair = Pair::start_with(&DaemonOptions::default(), |builder| {
            builder.pod(PodSpec::new("other").on("a").service_account("other"))
        })?;
        Self::around(pair)
    }

    fn around(pair: Pair) -> Result<Self> {
        Ok(Self {
            echo: pair
                .web
                .app(&format!("echo-server --port {PORT}"))?
                .listening()?,
            capture: pair.mesh.wire().capture()?,
            other: pair.mesh.pod("other"),
            pair,
        })
    }

    fn destinations(&self) -> [SocketAddr; 2] {
        [self.pair.web.at(PORT), self.pair.web.at6(PORT)]
    }

    /// Asserts that `answer`, of a client that has sent MARKER, came through a tunnel with the identity and an address of
    /// `owner`.
    fn assert_tunnelled(&mut self, answer: &Value, owner: &Pod) -> Result<()> {
        assert_eq!(answer["text"], MARKER, "{answer}");
        let accepted = self.echo.event("accepted", TIMEOUT)?;
        let client: SocketAddr = serde_json::from_value(accepted["peer"].clone())?;
        assert!(owner.addresses().contains(&client.ip()), "{accepted}");
        let line = self
            .pair
            .far
            .wait_for_access("the connection", TIMEOUT, |line| {
                line["client"] == client.to_string()
            })?;
        let identity = format!("spiffe://cluster.local/ns/default/sa/{}", owner.name());
        assert_eq!(line["client_identity"], identity, "{line}");
        assert_eq!(
            (&line["path"], &line["result"]),
            (&"tunnel".into(), &"ok".into()),
            "{line}"
        );
        self.assert_unreadable();
        Ok(())
    }

    fn assert_unreadable(&self) {
        let recording = self.capture.so_far();
        assert!(
            !recording.contains(MARKER.as_bytes()),
            "readable on the wire"
        );
    }
}

fn dial(from: &Place, to: SocketAddr, options: &str) -> Result<App> {
    from.app(&format!("dial --to {to} --send {MARKER} {options}"))
}

/// The number of a place's interface, as a scope in an IPv6 address.
fn scope(place: &Place, interface: &str) -> Result<u32> {
    Ok(place.enter(|| nix::net::if_::if_nametoindex(interface))??)
}

#[test]
fn a_destination_in_another_notation_is_captured() -> Result<()> {
    let mut stage = Stage::set()?;
    let client = stage.pair.client.clone();
    let (v4, v6) = (stage.pair.web.ipv4(), stage.pair.web.ipv6());
    let scope = scope(&client, "eth0")?;
    for to in [
        format!("[::ffff:{v4}]:{PORT}"),
        format!("[{v6}%{scope}]:{PORT}"),
        format!("[::ffff:{v4}%{scope}]:{PORT}"),
    ] {
        let answer = dial(&client, to.parse()?, "")?.success(TIMEOUT)?;
        stage.assert_tunnelled(&answer, &client)?;
    }
    Ok(())
}

#[test]
fn a_socket_bound_before_its_connect_is_captured() -> Result<()> {
    let mut stage = Stage::set()?;
    let client = stage.pair.client.clone();
    for (to, port) in stage.destinations().into_iter().zip([45_000, 46_000]) {
        let own = client.addresses()[usize::from(to.is_ipv6())];
        for options in [
            format!("--source-port {port}"),
            format!("--bind {own} --source-port {}", port + 1),
            format!("--bind {own} --port-at-connect"),
        ] {
            let answer = dial(&client, to, &options)?.success(TIMEOUT)?;
            stage.assert_tunnelled(&answer, &client)?;
        }
    }
    Ok(())
}

#[test]
fn a_connect_that_waits_for_the_first_bytes_is_captured() -> Result<()> {
    let mut stage = Stage::set()?;
    let client = stage.pair.client.clone();
    // The kernel's default, and data in the first SYN without a cookie, as client and as server.
    for setting in ["1", "1031"] {
        for pod in [&client, &stage.pair.web] {
            pod.netns()
                .set_parameters(&[("net/ipv4/tcp_fastopen", setting)])?;
        }
        for to in stage.destinations() {
            // Twice: the second time, a cookie may be there.
            for _ in 0..2 {
                let answer = dial(&client, to, "--fast-open-connect")?.success(TIMEOUT)?;
                stage.assert_tunnelled(&answer, &client)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_socket_made_before_its_pods_enrolment_is_captured() -> Result<()> {
    let mesh = builder()
        .pod(PodSpec::new("other").on("a").service_account("other"))
        .start()?;
    let client = mesh.pod("client");
    let signal = client.folder().join("connect");
    let options = format!("--after {}", signal.display());
    let web = mesh.pod("web");
    let mut clients = Vec::new();
    for to in [web.at(PORT), web.at6(PORT)] {
        let mut app = dial(&client, to, &options)?;
        app.event("socket", TIMEOUT)?;
        clients.push(app);
    }
    let mut stage = Stage::around(Pair::on(mesh, &DaemonOptions::default())?)?;
    fs::write(signal, "")?;
    for app in clients {
        let answer = app.success(TIMEOUT)?;
        stage.assert_tunnelled(&answer, &client)?;
    }
    Ok(())
}

#[test]
fn a_socket_given_to_another_pod_keeps_its_own_pods_identity() -> Result<()> {
    let mut stage = Stage::set()?;
    let client = stage.pair.client.clone();
    for to in stage.destinations() {
        let path = client.folder().join(format!("{}", to.is_ipv6()));
        let family = if to.is_ipv6() { "--v6" } else { "" };
        let giver = client
            .app(&format!("give-socket --at {} {family}", path.display()))?
            .listening()?;
        let given = format!("--given {}", path.display());
        let answer = dial(&stage.other, to, &given)?.success(TIMEOUT)?;
        giver.success(TIMEOUT)?;
        stage.assert_tunnelled(&answer, &client)?;
    }
    Ok(())
}

#[test]
fn a_process_in_another_pods_netns_has_that_pods_identity() -> Result<()> {
    let mut stage = Stage::set()?;
    let other = stage.other.clone();
    for to in stage.destinations() {
        // In the client's cgroup. Entering a netns takes CAP_SYS_ADMIN, over both the caller's own and the netns.
        let mut command = stage.pair.client.command(pod_app()?)?;
        command.args(["dial", "--to", &to.to_string(), "--send", MARKER]);
        let netns = fs::File::open(other.netns().path())?;
        // SAFETY: between fork and exec only setns(2) is called, which is async-signal-safe, on a file that the closure owns.
        unsafe {
            command.pre_exec(move || Ok(setns(&netns, CloneFlags::CLONE_NEWNET)?));
        }
        let events = Process::spawn(command)?.finish(TIMEOUT)?.ok()?.json_lines();
        let answer = events
            .last()
            .expect("a client that succeeds prints an event");
        stage.assert_tunnelled(answer, &other)?;
    }
    Ok(())
}

/// The daemon marks its deliveries to a pod's app. The mark of a pod's own socket grants nothing.
#[test]
fn a_socket_with_the_daemons_mark_is_captured() -> Result<()> {
    let mut stage = Stage::set()?;
    let client = stage.pair.client.clone();
    for to in stage.destinations() {
        let answer = dial(&client, to, &format!("--mark {DAEMONS_MARK}"))?.success(TIMEOUT)?;
        stage.assert_tunnelled(&answer, &client)?;
    }
    // Nor does it open a STRICT pod.
    let outside = stage.pair.mesh.outside().clone();
    for to in stage.destinations() {
        dial(&outside, to, &format!("--mark {DAEMONS_MARK}"))?.failure(TIMEOUT)?;
    }
    assert_eq!(stage.echo.events_of("accepted").len(), 2);
    Ok(())
}

#[test]
fn an_abstract_socket_does_not_leave_its_netns_and_is_no_connection_of_the_mesh() -> Result<()> {
    let stage = Stage::set()?;
    let name = UnixAddr::from_abstract_name("an-abstract-socket")?;
    let bind = || UnixListener::bind_addr(&name);
    let listener = stage.pair.client.enter(bind)??;
    let connect = || UnixStream::connect_addr(&name).map(drop);
    stage.pair.client.enter(connect)??;
    listener.accept()?;
    let error = stage.other.enter(connect)?.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    assert_eq!(stage.pair.near.access_log(), Vec::<Value>::new());
    Ok(())
}

/// From an address that no object lists, which lies beside those of the pod. The kernel sends the connection to the daemon,
/// which refuses it: the server would see another address than the app has, or one that is not its identity's.
#[test]
fn a_socket_bound_to_a_second_address_is_refused() -> Result<()> {
    let stage = Stage::set()?;
    let client = &stage.pair.client;
    for (second, to) in ["10.77.1.222", "fd77:1::222"]
        .into_iter()
        .zip(stage.destinations())
    {
        let prefix = if to.is_ipv6() { 64 } else { 24 };
        let mut command = format!("address add {second}/{prefix} dev eth0");
        if to.is_ipv6() {
            command.push_str(" nodad");
        }
        client.run("ip", command.split(' '))?.ok()?;
        for more in ["", "--port-at-connect"] {
            let start = stage.pair.near.log_position();
            let answer = dial(client, to, &format!("--bind {second} {more}"))?.failure(TIMEOUT)?;
            assert_eq!(answer["errno"], "ECONNRESET", "{answer}");
            let line =
                stage
                    .pair
                    .near
                    .wait_for_log_after(start, "the refusal", TIMEOUT, |line| {
                        line["target"] == "access" && line["direction"] == "outbound"
                    })?;
            assert_eq!(line["result"], "refused", "{line}");
            let reason = line["reason"].as_str().unwrap_or_default();
            assert!(
                reason.contains(&format!("says that it is {second}")),
                "{line}"
            );
        }
    }
    assert_eq!(stage.echo.events_of("accepted"), Vec::<Value>::new());
    stage.assert_unreadable();
    Ok(())
}

/// The client's kernel knows nothing of such an address and leaves the connect alone; the server's judges it.
#[test]
fn link_local_and_unlisted_unique_local_addresses_are_refused_by_the_server() -> Result<()> {
    let stage = Stage::set()?;
    let web = &stage.pair.web;
    // On the link of `web`, which such addresses do not leave.
    let near = stage
        .pair
        .mesh
        .add_pod(PodSpec::new("near").on("b").service_account("near"))?;
    stage.pair.far.wait_enrolled(&[near.full_name()])?;
    for (pod, address) in [(web, "fd99::2/64"), (&near, "fd99::3/64")] {
        pod.run("ip", ["address", "add", address, "dev", "eth0", "nodad"])?
            .ok()?;
    }
    let addresses = web
        .run("ip", ["-br", "-6", "address", "show", "eth0"])?
        .ok()?
        .stdout;
    let link_local = addresses
        .split_ascii_whitespace()
        .find_map(|word| {
            word.strip_suffix("/64")
                .filter(|word| word.starts_with("fe80:"))
        })
        .expect("an interface has a link-local address");
    let scoped = format!("[{link_local}%{}]:{PORT}", scope(&near, "eth0")?);
    for to in [scoped, format!("[fd99::2]:{PORT}")] {
        let to: SocketAddr = to.parse()?;
        let start = stage.pair.far.log_position();
        // The first call after the RST reports the error.
        dial(&near, to, "")?.failure(TIMEOUT)?;
        let line = stage
            .pair
            .far
            .wait_for_log_after(start, "the refusal", TIMEOUT, |line| {
                line["target"] == "access" && line["direction"] == "inbound"
            })?;
        assert_eq!(line["result"], "refused", "{line}");
        assert!(
            line["reason"]
                .as_str()
                .is_some_and(|why| why.contains("STRICT")),
            "{line}"
        );
        assert_eq!(line["client_identity"], "", "{line}");
        let client: SocketAddr = serde_json::from_value(line["client"].clone())?;
        assert!(matches!(client.ip(), IpAddr::V6(_)), "{line}");
    }
    assert_eq!(stage.echo.events_of("accepted"), Vec::<Value>::new());
    Ok(())
}

/// The kernel connects the subflows of a Multipath TCP connection itself, to any address that the server announces.
#[test]
fn a_subflow_to_the_mesh_is_captured_and_carries_nothing() -> Result<()> {
    if !std::path::Path::new("/proc/sys/net/mptcp/enabled").exists() {
        println!("SKIPPED a_subflow_to_the_mesh_is_captured_and_carries_nothing: no Multipath TCP");
        return Ok(());
    }
    let stage = Stage::set()?;
    let (client, web) = (&stage.pair.client, &stage.pair.web);
    let outside = stage.pair.mesh.outside();
    let _echo = outside
        .app(&format!("echo-server --port {PORT} --multipath"))?
        .listening()?;
    let ip = |place: &Place, command: &str| place.run("ip", command.split(' '))?.ok().map(drop);
    ip(client, "mptcp limits set subflows 2 add_addr_accepted 2")?;
    ip(outside, "mptcp limits set subflows 2 add_addr_accepted 0")?;
    ip(
        outside,
        &format!("mptcp endpoint add {} signal", web.ipv4()),
    )?;
    let to = SocketAddr::from((stage.pair.mesh.outside_ipv4(), PORT));
    let talk = client.app(&format!("chat --to {to} --multipath"))?;
    // The daemon's listener knows no subflow, so the kernel resets it.
    eventually_ok(TIMEOUT, "a subflow that is tried and reset", || {
        let counters = client.run("nstat", ["-asz"])?.ok()?.stdout;
        let count = |name: &str| {
            let mut words = counters.split_ascii_whitespace();
            words.find(|word| *word == name)?;
            words.next()?.parse::<u64>().ok()
        };
        for name in ["MPTcpExtMPJoinSynTx", "MPTcpExtMPRstTx"] {
            ensure!(count(name).is_some_and(|count| count > 0), "no {name}");
        }
        Ok(())
    })?;
    let rounds = talk.events_of("round").len();
    eventually(TIMEOUT, "more rounds on the first path", || {
        (talk.events_of("round").len() > rounds + 2).then_some(())
    })?;
    let recording = stage.capture.stop()?;
    assert!(
        !recording
            .tcp_between(client.ipv4().into(), to.ip())
            .packets()
            .is_empty()
    );
    for stream in recording
        .tcp_between(client.ipv4().into(), web.ipv4().into())
        .streams()
    {
        // A subflow that was not captured would be a SYN and a reset, without a byte.
        assert!(!stream.to_server.is_empty(), "{stream:?}");
        stream.tls_records()?;
    }
    assert_eq!(stage.echo.events_of("accepted"), Vec::<Value>::new());
    Ok(())
}
