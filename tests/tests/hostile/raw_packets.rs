//! A pod with CAP_NET_RAW sends its own TCP segments. No hook sees them leave, but they are not admitted: a STRICT pod judges
//! what arrives.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::ensure;
use etherparse::{PacketBuilder, PacketBuilderStep, SlicedPacket, TcpHeader, TransportSlice};
use mesh_tests::{
    App, Context, DaemonOptions, Endpoint, Place, Pod, PodSpec, Result, TIMEOUT, TcpState,
    eventually_ok,
};
use nix::libc;
use serde_json::Value;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::common::frames::{hardware_address, send_frame};
use crate::common::pair::{Pair, builder};

const PORT: u16 = 7;
/// Longer than the daemon waits for an app.
const SOON: Duration = Duration::from_secs(3);
const MARKER: &[u8] = b"marker-in-a-forged-segment";
/// As a client and as a server, data in a SYN without a cookie, for all listeners: see ip-sysctl.rst, tcp_fastopen.
const FAST_OPEN_FOR_ALL: &str = "1539";

/// How a pod sends its segments.
#[derive(Debug, Clone, Copy)]
enum With {
    /// SOCK_RAW: the kernel routes the packet.
    Packets,
    /// AF_PACKET: the pod writes the whole frame.
    Frames,
}

/// A TCP client in user space.
struct Client<'a> {
    pod: &'a Pod,
    with: With,
    source: SocketAddrV4,
    to: SocketAddrV4,
    /// Hardware addresses of the pod and of its gateway.
    link: [[u8; 6]; 2],
    /// Receives a copy of each TCP packet for the pod.
    received: Socket,
}

impl<'a> Client<'a> {
    fn new(pair: &'a Pair, with: With, source: SocketAddrV4, to: Ipv4Addr) -> Result<Self> {
        let pod = &pair.client;
        let gateway = pair.mesh.node("a").place();
        Ok(Self {
            pod,
            with,
            source,
            to: SocketAddrV4::new(to, PORT),
            link: [
                hardware_address(pod, "eth0")?,
                hardware_address(gateway, "cni0")?,
            ],
            received: pod.enter(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP)))??,
        })
    }

    /// Sends a SYN or, with a number to acknowledge, a segment that pushes its payload.
    fn send(&self, sequence: u32, acknowledged: Option<u32>, payload: &[u8]) -> Result<()> {
        let flags = |builder: PacketBuilderStep<TcpHeader>| match acknowledged {
            None => builder.syn(),
            Some(number) => builder.ack(number).psh(),
        };
        let (from, to) = (self.source.ip().octets(), self.to.ip().octets());
        let (from_port, to_port) = (self.source.port(), self.to.port());
        let mut bytes = Vec::new();
        match self.with {
            With::Packets => {
                let builder = PacketBuilder::ipv4(from, to, 64);
                flags(builder.tcp(from_port, to_port, sequence, 65_000))
                    .write(&mut bytes, payload)?;
                self.pod.enter(|| {
                    let socket = Socket::new(
                        Domain::IPV4,
                        Type::RAW,
                        Some(Protocol::from(libc::IPPROTO_RAW)),
                    )?;
                    socket.send_to(&bytes, &SockAddr::from(self.to)).map(drop)
                })??;
            }
            With::Frames => {
                let [own, gateway] = self.link;
                let builder = PacketBuilder::ethernet2(own, gateway).ipv4(from, to, 64);
                flags(builder.tcp(from_port, to_port, sequence, 65_000))
                    .write(&mut bytes, payload)?;
                self.pod.enter(|| send_frame("eth0", &bytes))??;
            }
        }
        Ok(())
    }

    /// The next segment from the server: its header and its payload.
    fn receive(&self) -> Result<(TcpHeader, Vec<u8>)> {
        let deadline = Instant::now() + TIMEOUT;
        let mut buffer = [0; 4096];
        loop {
            let rest = deadline.saturating_duration_since(Instant::now());
            self.received
                .set_read_timeout(Some(rest.max(Duration::from_millis(1))))?;
            let length = (&self.received)
                .read(&mut buffer)
                .context("waiting for an answer")?;
            let packet = SlicedPacket::from_ip(&buffer[..length])?;
            if let Some(TransportSlice::Tcp(segment)) = packet.transport
                && segment.source_port() == self.to.port()
                && segment.destination_port() == self.source.port()
            {
                return Ok((segment.to_header(), segment.payload().to_vec()));
            }
        }
    }
}

/// A pair with a pod `other` beside the client, whose kernel, like the client's, resets no connection that it does not know:
/// the worst case, because a forged connection then stays open.
fn stage() -> Result<Pair> {
    const SILENCE: &str = "add table inet quiet; \
        add chain inet quiet out { type filter hook output priority 0; }; \
        add rule inet quiet out tcp flags & rst == rst drop";
    let mesh = builder()
        .pod(PodSpec::new("other").on("a").service_account("other"))
        .start()?;
    for pod in ["client", "other"] {
        mesh.pod(pod).run("nft", [SILENCE])?.ok()?;
    }
    // Takes effect when a socket starts to listen, so before the daemon and the apps do.
    for server in [mesh.pod("web").place(), mesh.outside()] {
        server
            .netns()
            .set_parameters(&[("net/ipv4/tcp_fastopen", FAST_OPEN_FOR_ALL)])?;
    }
    Pair::on(mesh, &DaemonOptions::default())
}

fn echo_server(place: &Place) -> Result<App> {
    place
        .app(&format!("echo-server --port {PORT}"))?
        .listening()
}

/// Waits until the daemon of `web` has logged that it refused plaintext from `client`, and asserts that none of it
/// reached the app.
fn assert_refused(pair: &Pair, echo: &App, client: SocketAddrV4) -> Result<()> {
    assert_logged(pair, client)?;
    assert_eq!(echo.events_of("accepted"), Vec::<Value>::new());
    Ok(())
}

fn assert_logged(pair: &Pair, client: SocketAddrV4) -> Result<()> {
    let line = pair.far.wait_for_access("the refusal", TIMEOUT, |line| {
        line["client"] == client.to_string()
    })?;
    assert_eq!(
        (&line["direction"], &line["result"]),
        (&"inbound".into(), &"refused".into()),
        "{line}"
    );
    assert!(
        line["reason"]
            .as_str()
            .is_some_and(|why| why.contains("STRICT")),
        "{line}"
    );
    assert_eq!(line["client_identity"], "", "{line}");
    Ok(())
}

#[test]
fn refuses_forged_connection_with_data() -> Result<()> {
    let pair = stage()?;
    let echo = echo_server(&pair.web)?;
    let capture = pair.mesh.wire().capture()?;
    for (with, port) in [(With::Packets, 41_001), (With::Frames, 41_002)] {
        let source = SocketAddrV4::new(pair.client.ipv4(), port);
        let client = Client::new(&pair, with, source, pair.web.ipv4())?;
        client.send(1000, None, b"")?;
        let (header, _) = client.receive()?;
        assert!(header.syn && header.ack, "{with:?}: {header:?}");
        client.send(1001, Some(header.sequence_number.wrapping_add(1)), MARKER)?;
        loop {
            let (header, payload) = client.receive()?;
            assert!(payload.is_empty(), "{with:?}: {}", payload.escape_ascii());
            if header.rst {
                break;
            }
        }
        assert_refused(&pair, &echo, source)?;
    }
    // The pod's own bytes are on the wire: no hook sees what it sends past its kernel's TCP.
    assert!(capture.stop()?.contains(MARKER));
    Ok(())
}

#[test]
fn refuses_forged_syn_with_data() -> Result<()> {
    let pair = stage()?;
    let echo = echo_server(&pair.web)?;
    let mut echo_outside = echo_server(pair.mesh.outside())?;
    let capture = pair.mesh.wire().capture()?;
    // From its own address, and from that of another pod of the mesh.
    let mut port = 42_000;
    for address in [pair.client.ipv4(), pair.mesh.pod("other").ipv4()] {
        for with in [With::Packets, With::Frames] {
            port += 1;
            let source = SocketAddrV4::new(address, port);
            // A server outside the mesh shows that such a segment would reach an app.
            Client::new(&pair, with, source, pair.mesh.outside_ipv4())?.send(1000, None, MARKER)?;
            let accepted = echo_outside.event("accepted", TIMEOUT)?;
            assert_eq!(accepted["peer"], source.to_string(), "{accepted}");

            Client::new(&pair, with, source, pair.web.ipv4())?.send(1000, None, MARKER)?;
            assert_refused(&pair, &echo, source)?;
        }
    }
    let answers = capture
        .stop()?
        .only(|packet| packet.source == pair.web.at(PORT));
    assert!(!answers.packets().is_empty(), "no answer was captured");
    assert_eq!(answers.payload_bytes(), 0);
    Ok(())
}

/// A delivery waits because the app's listener is full. Its addresses and ports are then known to an observer of the
/// wire, and to the client.
#[test]
fn a_forged_syn_of_a_waiting_delivery_is_refused() -> Result<()> {
    /// The client's first source port.
    const WAITING: u16 = 43_001;
    /// The first source port of tunnels.
    const TUNNELS: u16 = 61_000;
    let pair = stage()?;
    // The queue has room for one more connection.
    pair.web
        .netns()
        .set_parameters(&[("net/core/somaxconn", "1")])?;
    let mut echo = echo_server(&pair.web)?;
    let to = SocketAddrV4::new(pair.web.ipv4(), PORT);
    let begin = |connections: u32, options: &str| {
        pair.client.app(&format!(
            "half-open --to {to} --connections {connections} {options}"
        ))
    };
    // Counts those from before, which the app has accepted, too.
    let in_the_queue = |count| {
        let sockets = pair.web.endpoints()?;
        let is_queued = |socket: &&Endpoint| {
            socket.local.port() == PORT && (1..TUNNELS).contains(&socket.remote.port())
        };
        let found = sockets.iter().filter(is_queued).count();
        ensure!(found >= count, "{found}: {sockets:?}");
        Ok(())
    };
    let a_delivery_waits = || -> Result<()> {
        let waiting = pair.web.sockets()?.of(TcpState::SynSent);
        ensure!(waiting == 1, "{waiting} deliveries wait");
        Ok(())
    };
    let mut fillers = Vec::new();
    let mut ports = WAITING..;
    // The daemon gives a delivery up after two seconds, and the kernel repeats its SYN once in this time. Again, from another
    // port, if something here takes longer.
    eventually_ok(TIMEOUT, "a delivery that outlasts a forged SYN", || {
        let port = ports.next().context("a port")?;
        let source = SocketAddrV4::new(pair.client.ipv4(), port);
        let client = Client::new(&pair, With::Packets, source, pair.web.ipv4())?;
        echo.process().suspend()?;
        let forged = (|| -> Result<App> {
            fillers.push(begin(2, "")?);
            let queued = 2 * fillers.len();
            eventually_ok(TIMEOUT, "the queue to be full", || in_the_queue(queued))?;
            let waiting = begin(1, &format!("--source-port {port}"))?;
            eventually_ok(SOON, "the delivery to wait", a_delivery_waits)?;
            forge(&client)?;
            a_delivery_waits()?;
            assert_logged(&pair, source)?;
            let accepted = echo.events_of("accepted").into_iter();
            let own = { accepted }.find(|event| event["peer"] == source.to_string());
            assert_eq!(own, None);
            Ok(waiting)
        })();
        echo.process().resume()?;
        let _waiting = forged?;
        while echo.event("accepted", SOON)?["peer"] != source.to_string() {}
        Ok(())
    })
}

/// Forges a connection, and sends data on it until the other side resets it.
fn forge(client: &Client<'_>) -> Result<()> {
    client.send(1000, None, b"")?;
    let (header, _) = client.receive()?;
    // By the daemon: the app's listener is full, and answers nobody.
    assert!(header.syn && header.ack, "{header:?}");
    client.send(1001, Some(header.sequence_number.wrapping_add(1)), MARKER)?;
    loop {
        let (header, payload) = client.receive()?;
        assert!(payload.is_empty(), "{}", payload.escape_ascii());
        if header.rst {
            return Ok(());
        }
    }
}
