//! Sockets inside pods' network namespaces: the daemon's listeners, and the connections that it makes from there.

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use auth_common::{
    DELIVERY, DIAL, NEIGHBOUR, ORIGINAL_SOURCE_MARK, OUTBOUND_PORT, SHARE, TUNNEL_PORT,
};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream};

use super::{Kernel, Netns};

const BACKLOG: i32 = 4096;
/// The loopback interface of every netns.
const LOOPBACK: &[u8] = b"lo";
/// Keep-alive for all connections that leave a netns. A vanished peer is detected within about two and a half minutes.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(75))
    .with_interval(Duration::from_secs(15))
    .with_retries(5);

/// The daemon's listeners in one pod.
#[derive(Debug)]
pub struct Listeners {
    /// Listeners for captured connections, on the pod's loopback: one for each address family.
    pub outbound: Vec<TcpListener>,
    /// Listener for tunnels, on all addresses of every family that the pod has. It also gets connections that the pod would
    /// have forwarded to others: see [`Enrolled::is_local`](super::Enrolled::is_local).
    pub tunnel: TcpListener,
}

impl Listeners {
    /// Opens a pod's listeners: for IPv4, and for IPv6 if the netns has it.
    pub fn open(kernel: &Kernel, netns: &Netns) -> io::Result<Self> {
        let listener = |address| listener(kernel, address);
        netns.enter(|| {
            let mut outbound = vec![listener(OUTBOUND_V4)?];
            let any = match listener(OUTBOUND_V6) {
                Ok(listener) => {
                    outbound.push(listener);
                    TUNNEL_V6
                }
                Err(error) if lacks_ipv6(&error) => TUNNEL_V4,
                Err(error) => return Err(error),
            };
            let tunnel = listener(any)?;
            Ok(Self { outbound, tunnel })
        })?
    }

    /// Opens the listener at `index` again, in the order of [`Listeners::all`], if it has died. Returns whether it had.
    pub(super) fn reopen(
        &mut self,
        index: usize,
        kernel: &Kernel,
        netns: &Netns,
    ) -> io::Result<bool> {
        let has_v6 = self.outbound.len() > 1;
        let (slot, address) = match (self.outbound.get_mut(index), index, has_v6) {
            (Some(slot), 0, _) => (slot, OUTBOUND_V4),
            (Some(slot), _, _) => (slot, OUTBOUND_V6),
            (None, _, true) => (&mut self.tunnel, TUNNEL_V6),
            (None, _, false) => (&mut self.tunnel, TUNNEL_V4),
        };
        if is_listening(&*slot) {
            return Ok(false);
        }
        *slot = netns.enter(|| listener(kernel, address))??;
        Ok(true)
    }

    /// The listeners for captured connections, then the one for tunnels.
    pub fn all(&self) -> impl Iterator<Item = &TcpListener> {
        self.outbound.iter().chain([&self.tunnel])
    }
}

/// Port of the workload API, on the loopback of the pods that may use it.
pub const WORKLOAD_API_PORT: u16 = 15082;

/// Opens the listener of the workload API in a pod. It accepts only what arrives on the loopback interface, so its callers are
/// in the pod's netns.
pub fn open_workload_api(kernel: &Kernel, netns: &Netns) -> io::Result<TcpListener> {
    netns.enter(|| {
        listen(kernel, WORKLOAD_API, |socket| {
            socket.bind_device(Some(LOOPBACK))
        })
    })?
}

const WORKLOAD_API: SocketAddr =
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), WORKLOAD_API_PORT);
const OUTBOUND_V4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), OUTBOUND_PORT);
const OUTBOUND_V6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), OUTBOUND_PORT);
const TUNNEL_V4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), TUNNEL_PORT);
const TUNNEL_V6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), TUNNEL_PORT);

/// Whether a listener still listens. A process with CAP_NET_ADMIN in its netns can end that (SOCK_DESTROY).
pub fn is_listening<'a>(listener: impl Into<SockRef<'a>>) -> bool {
    // If its state cannot be read, it counts as dead.
    listener.into().is_listener().unwrap_or(false)
}

fn lacks_ipv6(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
        || error.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

/// Opens a listener of the proxy.
fn listener(kernel: &Kernel, address: SocketAddr) -> io::Result<TcpListener> {
    listen(kernel, address, |socket| end_with_reset(socket.into()))
}

/// Opens a listener after `prepare` has set what is particular to its socket, which accepted sockets inherit.
fn listen(
    kernel: &Kernel,
    address: SocketAddr,
    prepare: impl FnOnce(&Socket) -> io::Result<()>,
) -> io::Result<TcpListener> {
    let named = |error: io::Error| {
        io::Error::new(
            error.kind(),
            format!(
                "cannot listen on {address} in the pod: {error}; does the pod itself use that port?"
            ),
        )
    };
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        socket.set_only_v6(false)?;
    }
    if address.ip().is_unspecified() {
        // It also gets connections that the pod would have forwarded, which are for no address of the netns.
        setsockopt(&socket, sockopt::IpTransparent, &true)?;
    }
    // Accepted sockets inherit these options.
    prepare(&socket)?;
    socket.set_tcp_keepalive(&KEEPALIVE)?;
    socket.set_tcp_nodelay(true)?;
    // Before there are connections, which inherit the mark.
    kernel.own(&socket).map_err(io::Error::other)?;
    socket.bind(&address.into()).map_err(named)?;
    socket.listen(BACKLOG).map_err(named)?;
    Ok(socket.into())
}

/// Makes closing `socket` send a RST, unless it is shut down cleanly first. Whatever happens to the daemon, an app
/// never mistakes a broken connection for a finished one.
pub fn end_with_reset(socket: SockRef<'_>) -> io::Result<()> {
    socket.set_linger(Some(Duration::ZERO))
}

/// Makes closing `socket` an ordinary close, which still delivers the written bytes.
pub fn end_in_good_order(socket: SockRef<'_>) -> io::Result<()> {
    socket.set_linger(None)
}

/// How long an app may take to receive the bytes written before a reset.
const DELIVERY_LIMIT: Duration = Duration::from_secs(2);

/// Resets the connection to a pod's app once the app's kernel has acknowledged all written bytes, or after
/// `DELIVERY_LIMIT`.
///
/// A receiver accepts a RST only if its sequence number is the expected one (RFC 5961 §3). If earlier segments were
/// dropped because a buffer was full, the receiver sends a challenge, to an address at which nobody in the pod's netns
/// may answer any more.
pub async fn reset_when_delivered(app: TcpStream) {
    let deadline = tokio::time::Instant::now() + DELIVERY_LIMIT;
    while unsent_bytes(&app) > 0 && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(app);
}

fn unsent_bytes(socket: &TcpStream) -> libc::c_int {
    let mut count = 0;
    // SAFETY: SIOCOUTQ, which has the same number as TIOCOUTQ (tcp(7)), writes one int to the given address.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) };
    if result == 0 { count } else { 0 }
}

/// Source ports of a pod's tunnels. They are outside the default range of apps' ephemeral ports, because a tunnel and
/// the app connections that it carries use the same pair of addresses in the server's netns.
#[derive(Debug, Default)]
pub struct SourcePorts {
    next: AtomicU32,
    /// Ports of the range that apps of the pod currently use.
    taken: Mutex<HashSet<u16>>,
}

/// Ports above the usual ephemeral range are used first, then those below.
const HIGH: std::ops::RangeInclusive<u16> = 61000..=65535;
const LOW: std::ops::RangeInclusive<u16> = 15100..=32767;
const ATTEMPTS: u32 = 128;

impl SourcePorts {
    /// Whether `port` is in the range of the tunnels' source ports.
    pub fn contain(port: u16) -> bool {
        HIGH.contains(&port) || LOW.contains(&port)
    }

    /// Reserves `port` for an app until the guard is dropped, so that no tunnel uses it. `None` if it is outside the
    /// range.
    pub fn reserve(&self, port: u16) -> Option<Reserved<'_>> {
        Self::contain(port).then(|| {
            self.lock().insert(port);
            Reserved { ports: self, port }
        })
    }

    /// The next port that no app of the pod uses, if there is one.
    fn next(&self) -> Option<u16> {
        let (high, low) = (HIGH.len() as u32, LOW.len() as u32);
        let taken = self.lock();
        (0..high + low).find_map(|_| {
            let index = self.next.fetch_add(1, Ordering::Relaxed) % (high + low);
            let port = if index < high {
                *HIGH.start() + index as u16
            } else {
                *LOW.start() + (index - high) as u16
            };
            (!taken.contains(&port)).then_some(port)
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<u16>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Guard for an app's port that tunnels must not use.
#[derive(Debug)]
pub struct Reserved<'a> {
    ports: &'a SourcePorts,
    port: u16,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.ports.lock().remove(&self.port);
    }
}

/// Connects from a pod's own address to `endpoint`, without being captured.
pub async fn dial_endpoint(
    kernel: &Kernel,
    netns: &Netns,
    source: IpAddr,
    ports: &SourcePorts,
    endpoint: SocketAddr,
) -> io::Result<TcpStream> {
    for _ in 0..ATTEMPTS {
        let socket = socket_in(kernel, netns, endpoint, DIAL)?;
        let Some(port) = ports.next() else { break };
        let from = SocketAddr::new(source, port);
        if let Some(connected) = connect_from(socket, from, endpoint).await? {
            return Ok(connected);
        }
    }
    Err(io::ErrorKind::AddrNotAvailable.into())
}

/// Connects to the app at `server`, an address of the pod in `netns`, from the address and port of `client`. Uses
/// another port of the same address if `keep_port` is false or the port is not available.
pub async fn dial_app(
    kernel: &Kernel,
    netns: &Netns,
    client: SocketAddr,
    keep_port: bool,
    server: SocketAddr,
) -> io::Result<TcpStream> {
    for port in [client.port(), 0] {
        if port != 0 && !keep_port {
            continue;
        }
        let socket = socket_in(kernel, netns, server, DELIVERY)?;
        // The inbound program passes what arrives on the loopback, which nobody outside the pod can reach.
        socket.bind_device(Some(LOOPBACK))?;
        setsockopt(&socket, sockopt::Mark, &ORIGINAL_SOURCE_MARK)?;
        if server.is_ipv4() {
            setsockopt(&socket, sockopt::IpTransparent, &true)?;
        } else {
            set_ipv6_transparent(&socket)?;
        }
        let from = SocketAddr::new(client.ip(), port);
        if let Some(connected) = connect_from(socket, from, server).await? {
            return Ok(connected);
        }
    }
    Err(io::ErrorKind::AddrNotAvailable.into())
}

/// Connects to the app at `server`, in another pod of this node, from the address and port of `client`, which is in the
/// pod in `netns`. Uses another port if that one is not available.
pub async fn dial_neighbour(
    kernel: &Kernel,
    netns: &Netns,
    client: SocketAddr,
    server: SocketAddr,
) -> io::Result<TcpStream> {
    for port in [client.port(), 0] {
        let socket = socket_in(kernel, netns, server, NEIGHBOUR)?;
        let from = SocketAddr::new(client.ip(), port);
        if let Some(connected) = connect_from(socket, from, server).await? {
            return Ok(connected);
        }
    }
    Err(io::ErrorKind::AddrNotAvailable.into())
}

/// Returns the source address that the kernel selects for a connection from `netns` to `remote`. Sends nothing.
pub fn source_towards(netns: &Netns, remote: SocketAddr) -> io::Result<IpAddr> {
    let socket = netns.enter(|| {
        Socket::new(
            Domain::for_address(remote),
            Type::DGRAM,
            Some(Protocol::UDP),
        )
    })??;
    socket.connect(&remote.into())?;
    let local = socket.local_addr()?.as_socket();
    local
        .map(|local| canonical(local).ip())
        .ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
}

/// Returns `None` if the address and port are not available: they are in use, or a closed connection with the same
/// 4-tuple is still in TIME_WAIT.
async fn connect_from(
    socket: Socket,
    from: SocketAddr,
    to: SocketAddr,
) -> io::Result<Option<TcpStream>> {
    let connected = match socket.bind(&from.into()) {
        Ok(()) => TcpSocket::from_std_stream(socket.into()).connect(to).await,
        Err(error) => Err(error),
    };
    match connected {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Err(io::Error::new(
            error.kind(),
            format!("refused: {SHARE} connections wait already for apps to accept them"),
        )),
        Ok(connected) => Ok(Some(connected)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn socket_in(kernel: &Kernel, netns: &Netns, remote: SocketAddr, kind: u32) -> io::Result<Socket> {
    let socket = netns.enter(|| {
        Socket::new(
            Domain::for_address(remote),
            Type::STREAM.nonblocking(),
            Some(Protocol::TCP),
        )
    })??;
    kernel.exempt(&socket, kind).map_err(io::Error::other)?;
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?;
    if kind != DELIVERY {
        // On the loopback no peer vanishes, and keep-alive takes four system calls.
        socket.set_tcp_keepalive(&KEEPALIVE)?;
    }
    end_with_reset(SockRef::from(&socket))?;
    Ok(socket)
}

/// Returns the destination that the client dialled, if the pod's netns has translated it (netfilter's connection tracking).
pub fn original_destination(socket: SockRef<'_>) -> Option<SocketAddr> {
    let v4 = socket.original_dst_v4();
    let original = v4.or_else(|_| socket.original_dst_v6()).ok()?;
    original.as_socket().map(canonical)
}

/// Sets `IPV6_TRANSPARENT` (Linux 2.6.37), which none of the libraries in use supports.
fn set_ipv6_transparent(socket: &Socket) -> io::Result<()> {
    set_option(socket.as_fd(), libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1)
}

/// Sets an option of a socket whose value is an int, for options that none of the libraries in use supports.
pub(super) fn set_option(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: `value` is a readable int, the length matches, and the descriptor is open.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Converts an IPv4-mapped IPv6 address to IPv4.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_none() => {
            // Drop the flow label and the scope, because addresses are compared.
            SocketAddrV6::new(*v6.ip(), v6.port(), 0, 0).into()
        }
        other => SocketAddr::new(other.ip().to_canonical(), other.port()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_ports_go_round_and_avoid_apps() {
        let ports = SourcePorts::default();
        assert_eq!(ports.next(), Some(61000));
        let reserved = ports.reserve(61001).unwrap();
        assert_eq!(ports.next(), Some(61002));
        drop(reserved);
        let all = HIGH.len() + LOW.len();
        let round: HashSet<u16> = (0..all).map(|_| ports.next().unwrap()).collect();
        assert_eq!(round.len(), all);
        assert!(round.iter().all(|port| SourcePorts::contain(*port)));
        let _all: Vec<_> = round.iter().map(|port| ports.reserve(*port)).collect();
        assert_eq!(ports.next(), None, "an app may take them all");
        assert!(ports.reserve(40000).is_none());
        assert!(!SourcePorts::contain(TUNNEL_PORT) && !SourcePorts::contain(OUTBOUND_PORT));
    }

    #[test]
    fn mapped_addresses_are_canonical() {
        let mapped: SocketAddr = "[::ffff:10.0.0.1]:80".parse().unwrap();
        assert_eq!(canonical(mapped), "10.0.0.1:80".parse().unwrap());
        let scoped: SocketAddr = "[fe80::1%3]:80".parse().unwrap();
        assert_eq!(canonical(scoped), "[fe80::1]:80".parse().unwrap());
    }
}
