//! Relays bytes between two plaintext connections, for a pod that connects to itself or a peer without a tunnel.

use std::{
    io,
    sync::atomic::{AtomicU64, Ordering},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::watch,
};

use auth_datapath::sockets::end_in_good_order;
use auth_tunnel::Counters;

const CHUNK_BYTES: usize = 32 * 1024;

/// Copies in both directions until both ends have finished. On an error, both connections are left to be reset.
///
/// `near` is the side whose bytes count as `up`.
pub(super) async fn relay(
    near: &mut TcpStream,
    far: &mut TcpStream,
    counters: &Counters,
) -> io::Result<()> {
    let (mut near_read, mut near_write) = near.split();
    let (mut far_read, mut far_write) = far.split();
    let (up_ended, down_ended) = (watch::Sender::new(false), watch::Sender::new(false));
    tokio::try_join!(
        one_way(
            &mut near_read,
            &mut far_write,
            &counters.up,
            &up_ended,
            down_ended.subscribe()
        ),
        one_way(
            &mut far_read,
            &mut near_write,
            &counters.down,
            &down_ended,
            up_ended.subscribe()
        ),
    )?;
    for socket in [near, far] {
        end_in_good_order((&*socket).into())?;
    }
    Ok(())
}

async fn one_way(
    from: &mut ReadHalf<'_>,
    to: &mut WriteHalf<'_>,
    count: &AtomicU64,
    ended: &watch::Sender<bool>,
    mut other_ended: watch::Receiver<bool>,
) -> io::Result<()> {
    loop {
        // Allocate the buffer only once there are bytes to read, so that an idle connection holds none.
        from.as_ref().readable().await?;
        let mut chunk = vec![0; CHUNK_BYTES];
        let read = from.read(&mut chunk).await?;
        if read == 0 {
            break;
        }
        to.write_all(&chunk[..read]).await?;
        count.fetch_add(read as u64, Ordering::Relaxed);
    }
    to.shutdown().await?;
    ended.send_replace(true);
    // A direction that has ended may still be reset while the other one continues.
    tokio::select! {
        _ = other_ended.wait_for(|ended| *ended) => Ok(()),
        broken = from.as_ref().ready(Interest::ERROR) => Err(
            broken.err().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into())
        ),
    }
}
