//! Two connections over one socket: each chunk follows a header of the connection's number and the chunk's length, both
//! four bytes in network byte order.

use std::io::{self, Error, ErrorKind};

use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex,
    split as halves,
};
use tokio::net::UnixStream;

/// The connections.
#[derive(Debug)]
pub(crate) struct Connections {
    /// On which the runtime calls the plugin.
    pub(crate) plugin: DuplexStream,
    /// On which the plugin calls the runtime.
    pub(crate) runtime: DuplexStream,
}

/// Splits the socket. The future carries the bytes and ends with the error that ends both connections.
pub(crate) fn split(stream: UnixStream) -> (Connections, impl Future<Output = Error>) {
    let (plugin, plugin_end) = duplex(CHUNK);
    let (runtime, runtime_end) = duplex(CHUNK);
    (
        Connections { plugin, runtime },
        carry(stream, plugin_end, runtime_end),
    )
}

async fn carry(stream: UnixStream, plugin: DuplexStream, runtime: DuplexStream) -> Error {
    let (from_socket, to_socket) = stream.into_split();
    let (from_plugin, to_plugin) = halves(plugin);
    let (from_runtime, to_runtime) = halves(runtime);
    let received = receive(from_socket, to_plugin, to_runtime);
    let sent = send(to_socket, from_plugin, from_runtime);
    let result: io::Result<()> = tokio::select! {
        result = received => result,
        result = sent => result,
    };
    result
        .err()
        .unwrap_or_else(|| ErrorKind::UnexpectedEof.into())
}

async fn receive(
    mut socket: impl AsyncRead + Unpin,
    mut plugin: WriteHalf<DuplexStream>,
    mut runtime: WriteHalf<DuplexStream>,
) -> io::Result<()> {
    loop {
        let connection = socket.read_u32().await?;
        let length = socket.read_u32().await?;
        if length > MOST {
            return Err(Error::new(
                ErrorKind::InvalidData,
                format!("a chunk of {length} bytes; the most is {MOST}"),
            ));
        }
        let mut chunk = (&mut socket).take(length.into());
        let copied = match connection {
            PLUGIN => tokio::io::copy(&mut chunk, &mut plugin).await?,
            RUNTIME => tokio::io::copy(&mut chunk, &mut runtime).await?,
            // Others may be added to the protocol; this plugin does not use them.
            _ => tokio::io::copy(&mut chunk, &mut tokio::io::sink()).await?,
        };
        if copied < length.into() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
}

async fn send(
    mut socket: impl AsyncWrite + Unpin,
    mut plugin: ReadHalf<DuplexStream>,
    mut runtime: ReadHalf<DuplexStream>,
) -> io::Result<()> {
    let (mut of_plugin, mut of_runtime) = ([0; CHUNK], [0; CHUNK]);
    loop {
        let (connection, chunk) = tokio::select! {
            read = plugin.read(&mut of_plugin) => (PLUGIN, &of_plugin[..read?]),
            read = runtime.read(&mut of_runtime) => (RUNTIME, &of_runtime[..read?]),
        };
        if chunk.is_empty() {
            return Ok(());
        }
        socket.write_u32(connection).await?;
        socket.write_u32(chunk.len() as u32).await?;
        socket.write_all(chunk).await?;
    }
}

/// The numbers of the connections.
const PLUGIN: u32 = 1;
const RUNTIME: u32 = 2;
/// The longest chunk that is sent, in bytes. The runtime's reader fails on one that does not fit its buffer.
const CHUNK: usize = 4096;
/// The longest chunk that is received, in bytes: a header and a message of ttrpc.
const MOST: u32 = 10 + (4 << 20);

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(connection: u32, chunk: &[u8]) -> Vec<u8> {
        let mut frame = connection.to_be_bytes().to_vec();
        frame.extend((chunk.len() as u32).to_be_bytes());
        frame.extend(chunk);
        frame
    }

    #[tokio::test]
    async fn carries_two_connections_and_skips_others() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (mut connections, carried) = split(ours);
        tokio::spawn(carried);
        let long = vec![7; 3 * CHUNK];
        for (connection, chunk) in [(PLUGIN, &b"one"[..]), (9, b"other"), (RUNTIME, b"two")] {
            theirs.write_all(&frame(connection, chunk)).await.unwrap();
        }
        let mut read = [0; 3];
        connections.plugin.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"one");
        connections.runtime.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"two");

        let writing = async { connections.plugin.write_all(&long).await.unwrap() };
        let reading = async {
            let mut received = Vec::new();
            while received.len() < long.len() {
                assert_eq!(theirs.read_u32().await.unwrap(), PLUGIN);
                let length = theirs.read_u32().await.unwrap() as usize;
                assert!(length <= CHUNK);
                let mut chunk = vec![0; length];
                theirs.read_exact(&mut chunk).await.unwrap();
                received.extend(chunk);
            }
            received
        };
        let ((), received) = tokio::join!(writing, reading);
        assert_eq!(received, long);
    }

    #[tokio::test]
    async fn ends_on_a_chunk_that_is_too_long_or_incomplete() {
        for (bytes, kind) in [
            (
                [PLUGIN.to_be_bytes(), (MOST + 1).to_be_bytes()].concat(),
                ErrorKind::InvalidData,
            ),
            (
                frame(PLUGIN, b"half")[..10].to_vec(),
                ErrorKind::UnexpectedEof,
            ),
            (Vec::new(), ErrorKind::UnexpectedEof),
        ] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let (_connections, carried) = split(ours);
            theirs.write_all(&bytes).await.unwrap();
            drop(theirs);
            assert_eq!(carried.await.kind(), kind);
        }
    }
}
