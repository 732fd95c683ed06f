//! Verification of a peer's certificate: the SVID, the chain to a root of its trust domain, and revocations.

use std::{collections::HashMap, sync::Arc};

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

use super::{
    svid::{NodeCertificate, Svid},
    trust::{NotFederated, TrustStore},
};

/// Maximum number of certificates between a workload's certificate and the root. A client's chain is part of every
/// session ticket that it receives.
const MAX_INTERMEDIATES: usize = 8;

/// The chain has more than [`MAX_INTERMEDIATES`] intermediates.
#[derive(Debug, thiserror::Error)]
#[error(
    "its chain is too large: {0} certificates between it and the root, at most {MAX_INTERMEDIATES} are read"
)]
struct ChainTooLarge(usize);

/// Verifies workload certificates of the mesh's trust domain and of those that it federates with: the SVID, and the chain to
/// a root of the SVID's own trust domain. The caller authorizes the identity after the handshake.
#[derive(Debug)]
pub struct Verifier {
    trust: Arc<TrustStore>,
    trust_domain: TrustDomain,
    own: Arc<Roots>,
    /// By the name of the trust domain.
    foreign: HashMap<String, Arc<Roots>>,
    is_of_ca: bool,
    provider: Arc<CryptoProvider>,
}

/// The roots of one trust domain.
#[derive(Debug)]
struct Roots {
    certificates: Vec<CertificateDer<'static>>,
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
}

impl Roots {
    fn new(
        certificates: &[CertificateDer<'static>],
        provider: &Arc<CryptoProvider>,
    ) -> Result<Arc<Self>, Error> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates {
            roots.add(certificate.clone())?;
        }
        let roots = Arc::new(roots);
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        Ok(Arc::new(Self {
            certificates: certificates.to_vec(),
            roots,
            clients,
        }))
    }
}

impl Verifier {
    /// Trusts the roots that `trust` has at the time of a handshake, those of each trust domain for its own names alone, and
    /// refuses what it says is revoked at that time. Those that it has now are prepared, so that they cost a handshake nothing.
    pub fn new(trust: Arc<TrustStore>, provider: Arc<CryptoProvider>) -> Result<Self, Error> {
        let bundle = &trust.current().bundle;
        let foreign = trust.foreign();
        let foreign = foreign
            .iter()
            .map(|(name, roots)| Ok((name.to_owned(), Roots::new(roots, &provider)?)));
        Ok(Self {
            trust_domain: bundle.trust_domain.clone(),
            own: Roots::new(&bundle.roots, &provider)?,
            foreign: foreign.collect::<Result<_, Error>>()?,
            trust,
            is_of_ca: false,
            provider,
        })
    }

    /// The same for the CA's server: clients may stay without a certificate, or present that of a node. Those that present
    /// one must pass. Whether a node's certificate is revoked, the CA checks itself.
    pub fn of_ca(self) -> Self {
        Self {
            is_of_ca: true,
            ..self
        }
    }

    /// Checks the SVID, and returns the current roots of its trust domain.
    fn check_svid(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<Arc<Roots>, Error> {
        if intermediates.len() > MAX_INTERMEDIATES {
            return Err(refused(ChainTooLarge(intermediates.len())));
        }
        if self.is_of_ca && NodeCertificate::parse(leaf, &self.trust_domain).is_ok() {
            return self.current(Some(&self.own), &self.trust.current().bundle.roots);
        }
        let svid = Svid::parse_of_any(leaf, &self.trust_domain).map_err(refused)?;
        let own = self.trust.check(&svid).map_err(refused)?;
        let name = svid.identity.trust_domain();
        if name == self.trust_domain.as_str() {
            return self.current(Some(&self.own), &own.bundle.roots);
        }
        let foreign = self.trust.foreign();
        let Some(roots) = foreign.roots(name) else {
            return Err(refused(NotFederated(svid.identity.clone())));
        };
        self.current(self.foreign.get(name), roots)
    }

    /// Returns the prepared roots if they are those of `current`, else others: roots may have been added or removed since.
    fn current(
        &self,
        prepared: Option<&Arc<Roots>>,
        current: &[CertificateDer<'static>],
    ) -> Result<Arc<Roots>, Error> {
        match prepared {
            Some(prepared) if prepared.certificates == current => Ok(prepared.clone()),
            _ => Roots::new(current, &self.provider),
        }
    }
}

/// The error of a verifier that refuses a certificate for a reason that rustls does not have.
pub fn refused(why: impl std::error::Error + Send + Sync + 'static) -> Error {
    CertificateError::Other(OtherError(Arc::new(why))).into()
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
        let Roots { roots, .. } = &*self.check_svid(end_entity, intermediates)?;
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            roots,
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
        Err(Error::General("TLS 1.2 is not supported".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        // Signatures are verified in the same way for all trust domains.
        self.own
            .clients
            .verify_tls13_signature(message, certificate, signature)
            .map_err(|error| match error {
                Error::InvalidCertificate(CertificateError::BadSignature) => refused(NotTheHolder),
                error => error,
            })
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.own.clients.supported_verify_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn client_auth_mandatory(&self) -> bool {
        !self.is_of_ca
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
        self.check_svid(end_entity, intermediates)?
            .clients
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
        self.own.clients.supported_verify_schemes()
    }
}

/// The peer presented a certificate without holding its private key.
#[derive(Debug, thiserror::Error)]
#[error("the peer does not hold the key of the certificate that it presents")]
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

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
    };

    use super::*;
    use crate::tls::{
        provider,
        trust::{ForeignBundles, Trust, TrustBundle},
    };

    const OWN: &str = "own.example";
    const FOREIGN: &str = "foreign.example";
    const SECOND: &str = "second.example";
    const STRANGER: &str = "stranger.example";

    /// The CA of one trust domain. All have the same subject.
    struct Authority {
        issuer: Issuer<'static, KeyPair>,
        root: CertificateDer<'static>,
    }

    impl Authority {
        fn new() -> Self {
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            let key = KeyPair::generate().unwrap();
            let root = params.self_signed(&key).unwrap().der().clone();
            let issuer = Issuer::new(params, key);
            Self { issuer, root }
        }

        fn bundle(&self, trust_domain: &str) -> TrustBundle {
            TrustBundle::of_roots(trust_domain.parse().unwrap(), vec![self.root.clone()])
        }

        /// Signs a certificate of the service account `web`, in any trust domain.
        fn sign(&self, trust_domain: &str) -> CertificateDer<'static> {
            let mut params = CertificateParams::default();
            let uri = format!("spiffe://{trust_domain}/ns/default/sa/web");
            params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into().unwrap())];
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            let key = KeyPair::generate().unwrap();
            params.signed_by(&key, &self.issuer).unwrap().der().clone()
        }
    }

    fn trust(own: &Authority) -> Arc<TrustStore> {
        Arc::new(TrustStore::new(Trust::fixed(own.bundle(OWN))))
    }

    /// Whether `verifier` accepts a client, and a server, with this certificate.
    fn accepts(verifier: &Verifier, certificate: &CertificateDer<'_>) -> bool {
        let client = verifier.verify_client_cert(certificate, &[], UnixTime::now());
        let name = ServerName::try_from("10.0.0.1").unwrap();
        let server = verifier.verify_server_cert(certificate, &[], &name, &[], UnixTime::now());
        assert_eq!(client.is_ok(), server.is_ok(), "{client:?} {server:?}");
        client.is_ok()
    }

    #[test]
    fn each_trust_domains_roots_verify_its_own_names_alone() {
        let authorities = [OWN, FOREIGN, SECOND, STRANGER].map(|name| (name, Authority::new()));
        let [(_, own), (_, foreign), (_, second), _] = &authorities;
        let trust = trust(own);
        let mut bundles = ForeignBundles::default();
        bundles.insert(foreign.bundle(FOREIGN));
        bundles.insert(second.bundle(SECOND));
        trust.publish_foreign(bundles);
        let verifier = Verifier::new(trust, Arc::new(provider())).unwrap();
        for (issuer, authority) in &authorities {
            for (name, _) in &authorities {
                let expected = issuer == name && *name != STRANGER;
                let accepted = accepts(&verifier, &authority.sign(name));
                assert_eq!(accepted, expected, "{issuer} issues a name of {name}");
            }
        }
    }

    #[test]
    fn a_foreign_trust_domain_is_trusted_as_long_as_its_bundle_is_there() {
        let (own, foreign) = (Authority::new(), Authority::new());
        let trust = trust(&own);
        let certificate = foreign.sign(FOREIGN);
        let verifier = || Verifier::new(trust.clone(), Arc::new(provider())).unwrap();
        assert!(!accepts(&verifier(), &certificate), "no bundle");
        let mut bundles = ForeignBundles::default();
        bundles.insert(foreign.bundle(FOREIGN));
        trust.publish_foreign(bundles.clone());
        let trusting = verifier();
        assert!(accepts(&trusting, &certificate));
        assert!(accepts(&trusting, &own.sign(OWN)));
        // A bundle without roots withdraws all that were published before (Trust Domain and Bundle §4.1.3).
        bundles.insert(TrustBundle {
            roots: vec![],
            ..foreign.bundle(FOREIGN)
        });
        trust.publish_foreign(bundles);
        assert!(!accepts(&trusting, &certificate), "at once");
        assert!(!accepts(&verifier(), &certificate));
        assert!(accepts(&trusting, &own.sign(OWN)));
    }

    #[test]
    fn a_rotation_counts_at_once_and_refuses_nothing_that_is_still_trusted() {
        let own = Authority::new();
        let [old, new] = [Authority::new(), Authority::new()];
        let trust = trust(&own);
        let publish = |trust_domain: &str, authorities: &[&Authority]| {
            let bundle = TrustBundle::of_roots(
                trust_domain.parse().unwrap(),
                authorities.iter().map(|one| one.root.clone()).collect(),
            );
            if trust_domain == OWN {
                return trust.publish(Trust::fixed(bundle));
            }
            let mut bundles = ForeignBundles::default();
            bundles.insert(bundle);
            trust.publish_foreign(bundles);
        };
        for trust_domain in [FOREIGN, OWN] {
            publish(trust_domain, &[&old]);
            // One that handshakes under way still have, however often the roots change.
            let verifier = Verifier::new(trust.clone(), Arc::new(provider())).unwrap();
            let trusted = || [&old, &new].map(|one| accepts(&verifier, &one.sign(trust_domain)));
            assert_eq!(trusted(), [true, false]);
            publish(trust_domain, &[&old, &new]);
            assert_eq!(trusted(), [true, true], "a root is added");
            publish(trust_domain, &[&new]);
            assert_eq!(trusted(), [false, true], "a root is removed");
        }
    }

    #[test]
    fn nodes_and_persons_in_foreign_certificates_mean_nothing_here() {
        use crate::tls::svid::{NODE_EXTENSION, PERSON_EXTENSION, encode_node, encode_person};
        let authority = Authority::new();
        let sign = |trust_domain: &str| {
            let mut params = CertificateParams::default();
            let uri = format!("spiffe://{trust_domain}/ns/default/sa/web");
            params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into().unwrap())];
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            let extension =
                |identifier, content| rcgen::CustomExtension::from_oid_content(identifier, content);
            params.custom_extensions = vec![
                extension(&NODE_EXTENSION, encode_node("node-a")),
                extension(&PERSON_EXTENSION, encode_person("oidc:alice").unwrap()),
            ];
            let key = KeyPair::generate().unwrap();
            let certificate = params.signed_by(&key, &authority.issuer).unwrap();
            Svid::parse_of_any(certificate.der(), &OWN.parse().unwrap()).unwrap()
        };
        let own = sign(OWN);
        assert_eq!(
            (own.node.as_deref(), own.person.as_deref()),
            (Some("node-a"), Some("oidc:alice"))
        );
        let foreign = sign(FOREIGN);
        assert_eq!((foreign.node, foreign.person), (None, None));
    }
}
