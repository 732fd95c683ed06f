//! How a link reaches its server: by the files that the configuration names, or in another way.

use std::{fmt, io};

use futures_util::future::{BoxFuture, FutureExt, ready};
use rustls::pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tonic::metadata::{Ascii, MetadataValue};

use super::link::{read_roots, read_token};
use crate::config::CaServer;

/// A connection that TLS can run over.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// The value of `authorization`: a bearer token.
pub type Bearer = MetadataValue<Ascii>;

/// Where a link's roots, tokens and connections come from. Errors are for people, and contain no part of a token.
pub trait Access: fmt::Debug + Send + Sync {
    /// Returns the roots that the server is verified against: at least one. Called for each connection.
    fn roots(&self) -> Result<Vec<CertificateDer<'static>>, String>;
    /// Returns the token that says who asks. Called for each request.
    fn token(&self) -> BoxFuture<'_, Result<Bearer, String>>;
    /// Proves more to the CA about the holder of the key of `csr` (PKCS #10, PEM), before that is sent. By default nothing.
    fn prove<'a>(&'a self, _csr: &'a str) -> BoxFuture<'a, ()> {
        ready(()).boxed()
    }
    /// Connects to the server.
    fn dial(&self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>>;
}

/// The files are read at each use, so that they can be replaced.
impl Access for CaServer {
    fn roots(&self) -> Result<Vec<CertificateDer<'static>>, String> {
        read_roots(self)
    }

    fn token(&self) -> BoxFuture<'_, Result<Bearer, String>> {
        ready(read_token(self)).boxed()
    }

    fn dial(&self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        async {
            let tcp = TcpStream::connect(&self.address).await?;
            tcp.set_nodelay(true)?;
            Ok(Box::new(tcp) as Box<dyn Stream>)
        }
        .boxed()
    }
}
