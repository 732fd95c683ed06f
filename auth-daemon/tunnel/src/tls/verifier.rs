//! Verification of a peer's certificate: the chain to a root of the trust domain, the SVID, and revocations.

use std::sync::Arc;

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};

use auth_mesh::TrustDomain;

use super::{svid::Svid, trust::TrustStore};

/// Maximum number of certificates between a workload's certificate and the root. A client's chain is part of every
/// session ticket that it receives.
const MAX_INTERMEDIATES: usize = 8;

/// The chain has more than [`MAX_INTERMEDIATES`] intermediates.
#[derive(Debug, thiserror::Error)]
#[error(
    "its chain is too large: {0} certificates between it and the root, at most {MAX_INTERMEDIATES} are read"
)]
struct ChainTooLarge(usize);

/// Verifies workload certificates of one trust domain: the chain to one of its roots, and the SVID. The caller
/// authorizes the identity after the handshake.
#[derive(Debug)]
pub struct Verifier {
    trust: Arc<TrustStore>,
    trust_domain: TrustDomain,
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
    clients_may_be_anonymous: bool,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    /// Trusts the roots that `trust` has now, and refuses what it says is revoked at the time of a handshake.
    pub fn new(trust: Arc<TrustStore>, provider: Arc<CryptoProvider>) -> Result<Self, Error> {
        let bundle = &trust.current().bundle;
        let mut roots = RootCertStore::empty();
        for root in &bundle.roots {
            roots.add(root.clone())?;
        }
        let roots = Arc::new(roots);
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        Ok(Self {
            trust_domain: bundle.trust_domain.clone(),
            trust,
            roots,
            clients,
            clients_may_be_anonymous: false,
            provider,
        })
    }

    /// The same, but clients may stay without a certificate. Those that present one must pass.
    pub fn with_anonymous_clients(self) -> Self {
        Self {
            clients_may_be_anonymous: true,
            ..self
        }
    }

    fn check_svid(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<(), Error> {
        if intermediates.len() > MAX_INTERMEDIATES {
            let error = ChainTooLarge(intermediates.len());
            return Err(CertificateError::Other(OtherError(Arc::new(error))).into());
        }
        let svid = Svid::parse(leaf, &self.trust_domain)
            .map_err(|error| CertificateError::Other(OtherError(Arc::new(error))))?;
        self.trust
            .current()
            .revoked
            .check(&svid)
            .map_err(|revoked| CertificateError::Other(OtherError(Arc::new(revoked))).into())
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        // Check the certificate's content first, because that gives a more specific error than an invalid chain.
        self.check_svid(end_entity, intermediates)?;
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )
        .map_err(chain_error)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.clients
            .verify_tls13_signature(message, certificate, signature)
            .map_err(|error| match error {
                Error::InvalidCertificate(CertificateError::BadSignature) => {
                    CertificateError::Other(OtherError(Arc::new(NotTheHolder))).into()
                }
                error => error,
            })
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.clients.supported_verify_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn client_auth_mandatory(&self) -> bool {
        !self.clients_may_be_anonymous
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A client has only one certificate to present. Root names would only disclose information to unauthenticated
        // peers.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check_svid(end_entity, intermediates)?;
        self.clients
            .verify_client_cert(end_entity, intermediates, now)
            .map_err(chain_error)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ServerCertVerifier::verify_tls12_signature(self, message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ServerCertVerifier::verify_tls13_signature(self, message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.clients.supported_verify_schemes()
    }
}

/// The peer presented a certificate without holding its private key.
#[derive(Debug, thiserror::Error)]
#[error("the peer does not hold the key of the certificate that it shows")]
struct NotTheHolder;

/// Maps webpki's own chain errors (a leaf that signs, a loop, too many certificates) to an unknown issuer, because each
/// of them means that the chain does not lead to a trusted root.
fn chain_error(error: Error) -> Error {
    match error {
        Error::InvalidCertificate(CertificateError::Other(_)) => {
            CertificateError::UnknownIssuer.into()
        }
        error => error,
    }
}
