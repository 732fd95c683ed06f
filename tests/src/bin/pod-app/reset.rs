//! A side that closes its connection with RST.

use std::io::{Read, Write};
use std::time::Duration;

use clap::Args;
use serde_json::json;
use socket2::SockRef;

use crate::peer::Peer;
use crate::report::{At, Outcome};

/// As a server, reads a number of bytes and resets the connection. As a client of an `echo-server`, sends that many,
/// waits until they come back, and resets the connection.
#[derive(Debug, Clone, Args)]
pub(crate) struct Reset {
    #[command(flatten)]
    peer: Peer,
    /// Bytes before the reset
    #[arg(long, default_value_t = 0)]
    after: usize,
    /// Shut down the sending direction before the reset
    #[arg(long)]
    shutdown: bool,
}

impl Reset {
    pub(crate) fn run(self) -> Outcome {
        let (after, shutdown, is_client) = (self.after, self.shutdown, self.peer.is_client());
        self.peer.run(move |stream, _| {
            let mut bytes = vec![b'r'; after];
            if is_client {
                stream.write_all(&bytes).at("write")?;
            }
            stream.read_exact(&mut bytes).at("read")?;
            if shutdown {
                crate::report::end_sending(stream).at("shutdown")?;
            }
            // With a linger time of 0, close sends RST instead of FIN, see socket(7).
            SockRef::from(&*stream)
                .set_linger(Some(Duration::ZERO))
                .at("set SO_LINGER")?;
            Ok(json!({"received": after}))
        })
    }
}
