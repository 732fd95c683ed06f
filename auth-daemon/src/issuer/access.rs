//! How a link reaches its server: by the files that the configuration names, or in another way.

use std::{fmt, io, sync::Arc};

use futures_util::future::{BoxFuture, FutureExt, ready};
use rustls::{pki_types::CertificateDer, sign::CertifiedKey};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tonic::metadata::{Ascii, MetadataValue};

use super::{
    link::{read_roots, token_in},
    machine::Machine,
};
use crate::config::{CaServer, Proof};

/// A connection that TLS can run over.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// The value of `authorization`: a bearer token.
pub type Bearer = MetadataValue<Ascii>;

/// Where a link's roots, tokens and connections come from. Errors are for people, and contain no part of a token.
pub trait Access: fmt::Debug + Send + Sync {
    /// Returns the roots that the server is verified against: at least one. Called for each connection.
    fn roots(&self) -> Result<Vec<CertificateDer<'static>>, String>;
    /// Returns the token that says who asks, or none if the certificate of the connection says it. Called for each request.
    fn token(&self) -> BoxFuture<'_, Result<Option<Bearer>, String>>;
    /// Returns the certificate that says who asks. Called for each connection. By default none.
    fn certificate(&self) -> Option<Arc<CertifiedKey>> {
        None
    }
    /// Gives the CA further proof about the holder of the key of `csr` (PKCS #10, PEM), before that is sent. By default
    /// none.
    fn prove<'a>(&'a self, _csr: &'a str) -> BoxFuture<'a, ()> {
        ready(()).boxed()
    }
    /// Connects to the server.
    fn dial(&self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>>;
}

impl CaServer {
    /// Fails with all errors, each with its field, if files cannot be used.
    pub(crate) fn check(&self) -> Result<(), String> {
        let proof = match &self.proof {
            Proof::Token(file) => token_in(file).map(drop).map_err(|why| self.field(why)),
            Proof::Join(join) => Machine::check(self, join),
        };
        match (read_roots(self), proof) {
            (Err(roots), Err(proof)) => Err(format!("{roots}\n{proof}")),
            (Ok(_), proof) => proof,
            (Err(roots), Ok(())) => Err(roots),
        }
    }

    /// Puts the field of the token's file before an error about it.
    pub(super) fn field(&self, why: String) -> String {
        let field = match &self.proof {
            Proof::Token(_) => "tokenFile",
            Proof::Join(_) => "joinTokenFile",
        };
        format!("{}.{field}: {why}", self.section)
    }
}

/// The files are read at each use, so that they can be replaced.
impl Access for CaServer {
    fn roots(&self) -> Result<Vec<CertificateDer<'static>>, String> {
        read_roots(self)
    }

    fn token(&self) -> BoxFuture<'_, Result<Option<Bearer>, String>> {
        let file = self.proof.file();
        ready(token_in(file).map(Some).map_err(|why| self.field(why))).boxed()
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
