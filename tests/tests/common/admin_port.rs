//! The admin ports of several nodes, in one place.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    thread,
};

use mesh_tests::Netns;

/// The daemon's admin port.
const ADMIN: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 15000);

/// Makes the admin port of the daemon in `to` reachable in `from`, as `kubectl port-forward` would. Returns the address.
pub(crate) fn forward_admin_port(from: &Netns, to: &Netns) -> SocketAddr {
    let listener = from
        .enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
        .unwrap()
        .unwrap();
    let address = listener.local_addr().unwrap();
    let to = to.clone();
    // They end with the test's process.
    thread::spawn(move || {
        for near in listener.incoming() {
            let near = near.unwrap();
            // Without a daemon, the connection is closed.
            let Ok(far) = to.enter(|| TcpStream::connect(ADMIN)).unwrap() else {
                continue;
            };
            let copy = |mut from: TcpStream, mut to: TcpStream| {
                thread::spawn(move || {
                    let _ = io::copy(&mut from, &mut to);
                    let _ = to.shutdown(std::net::Shutdown::Write);
                })
            };
            copy(near.try_clone().unwrap(), far.try_clone().unwrap());
            copy(far, near);
        }
    });
    address
}
