//! Carries bytes between two plain connections: a pod that reached itself, or a caller without the tunnel.

use std::{io, sync::atomic::Ordering};

use tokio::{io::copy_bidirectional, net::TcpStream};

use crate::{datapath::sockets::end_in_good_order, tunnel::Counters};

/// Copies both ways until both ends have finished. On an error both are left to be reset.
pub(super) async fn relay(
    near: &mut TcpStream,
    far: &mut TcpStream,
    counters: &Counters,
) -> io::Result<()> {
    let (up, down) = copy_bidirectional(near, far).await?;
    counters.up.fetch_add(up, Ordering::Relaxed);
    counters.down.fetch_add(down, Ordering::Relaxed);
    for socket in [near, far] {
        end_in_good_order((&*socket).into())?;
    }
    Ok(())
}
