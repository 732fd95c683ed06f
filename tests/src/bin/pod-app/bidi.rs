//! Bulk transfer in both directions at the same time.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;

use clap::Args;
use serde_json::json;

use crate::pattern::{self, Header};
use crate::peer::Peer;
use crate::report::{At, Failure, Outcome};

/// Sends and receives the same number of bytes, as a client and as a server. Both sides verify the bytes, and the
/// client waits for the server's confirmation that all were right.
#[derive(Debug, Clone, Args)]
pub(crate) struct Bidi {
    #[command(flatten)]
    peer: Peer,
    /// Bytes each way on each connection; the client's value applies
    #[arg(long, default_value_t = 0)]
    bytes: u64,
}

impl Bidi {
    pub(crate) fn run(self) -> Outcome {
        let (length, is_client) = (self.bytes, self.peer.is_client());
        self.peer.run(move |stream, number| {
            if is_client {
                client(
                    stream,
                    Header {
                        seed: number,
                        length,
                    },
                )
            } else {
                server(stream)
            }
        })
    }
}

fn client(stream: &mut TcpStream, header: Header) -> Outcome {
    header.write(&*stream).at("write")?;
    let sender = stream.try_clone().at("dup")?;
    thread::scope(|scope| {
        let sent = scope.spawn(move || {
            pattern::send(&sender, header.seed, header.length).at("write")?;
            crate::report::end_sending(&sender).at("shutdown")
        });
        pattern::receive(&*stream, answer_seed(header), header.length, |_| {})
            .inspect_err(|_| give_up(stream))
            .at("read")?;
        join(sent.join())
    })?;
    let mut verdict = [0; 1];
    stream.read_exact(&mut verdict).at("read")?;
    pattern::expect_end(&*stream).at("read")?;
    Ok(json!({"sent": header.length, "received": header.length}))
}

fn server(stream: &mut TcpStream) -> Outcome {
    let header = Header::read(&*stream).at("read")?;
    let sender = stream.try_clone().at("dup")?;
    thread::scope(|scope| {
        let sent = scope
            .spawn(move || pattern::send(&sender, answer_seed(header), header.length).at("write"));
        pattern::receive(&*stream, header.seed, header.length, |_| {})
            .and_then(|()| pattern::expect_end(&*stream))
            .inspect_err(|_| give_up(stream))
            .at("read")?;
        join(sent.join())
    })?;
    stream.write_all(&[1]).at("write")?;
    Ok(json!({"sent": header.length, "received": header.length}))
}

/// Unblocks the other thread's write, which may wait for a peer that no longer reads.
fn give_up(stream: &TcpStream) {
    let _ = stream.shutdown(Shutdown::Both);
}

fn answer_seed(header: Header) -> u64 {
    !header.seed
}

fn join(result: thread::Result<Result<(), Failure>>) -> Result<(), Failure> {
    result.map_err(|_| Failure::new("thread", io::Error::other("it panicked")))?
}
