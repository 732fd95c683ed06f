//! A signing certificate from another CA, in the files of Istio's `cacerts`.

use std::{io, path::Path, sync::Arc, time::Duration};

use auth_mesh::TrustDomain;
use auth_support::files::{self, Readers};
use rcgen::{CertificateParams, KeyPair, PublicKeyData};
use rustls::{
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, TrustAnchor, UnixTime, pem::PemObject},
};
use webpki::{EndEntityCert, Error as ChainError, KeyUsage, anchor_from_trusted_cert};
use x509_parser::certificate::X509Certificate;

use crate::{
    csr::RequestedKey,
    signer::{self, Holder, Life, Signer},
};

const CERTIFICATE: &str = "ca-cert.pem";
const KEY: &str = "ca-key.pem";
const ROOTS: &str = "root-cert.pem";
const CHAIN: &str = "cert-chain.pem";
/// Largest file that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;
/// Most certificates between a leaf and the root: as many as the tunnel reads.
const MAX_INTERMEDIATES: usize = 8;

/// The content of the files.
pub(crate) struct Intermediate {
    pub(crate) signer: Arc<Signer>,
    /// The valid roots of root-cert.pem, the one above the signer first.
    pub(crate) roots: Vec<CertificateDer<'static>>,
}

impl Intermediate {
    /// Reads and checks the files in `directory`, at `now` (seconds since the Unix epoch). Returns all errors, each
    /// with its file.
    pub(crate) fn load(
        directory: &Path,
        trust_domain: &TrustDomain,
        now: u64,
    ) -> Result<Self, Vec<String>> {
        let mut errors = Vec::new();
        let mut note = |name: &str, what: String| {
            errors.push(format!("{}: {what}", directory.join(name).display()));
        };
        let mut ok = |name: &str, result: Result<Vec<CertificateDer<'static>>, String>| {
            result.map_err(|what| note(name, what)).ok()
        };
        let own = ok(CERTIFICATE, certificates(directory, CERTIFICATE));
        let roots = ok(ROOTS, certificates(directory, ROOTS));
        let chain = ok(CHAIN, certificates(directory, CHAIN));
        let key = read(&directory.join(KEY), Readers::OwnGroup)
            .and_then(|pem| signer::key_from_pem(&pem))
            .map_err(|what| note(KEY, what));
        let (Some(own), Some(roots), Some(chain)) = (own, roots, chain) else {
            return Err(errors);
        };
        // Some tools put the whole chain into ca-cert.pem: the first certificate counts.
        let own = own[0].clone();
        let parsed = match signer::parse(&own) {
            Ok(parsed) => parsed,
            Err(what) => {
                note(CERTIFICATE, what);
                return Err(errors);
            }
        };
        for what in check_own(&parsed, trust_domain, now) {
            note(CERTIFICATE, what);
        }
        if let Ok(key) = &key
            && key.subject_public_key_info() != parsed.public_key().raw
        {
            note(KEY, format!("is not the key of {CERTIFICATE}"));
        }
        if let Ok(Some(usage)) = parsed.key_usage()
            && !usage.value.crl_sign()
        {
            tracing::warn!(
                file = %directory.join(CERTIFICATE).display(),
                "keyUsage lacks cRLSign: daemons of this mesh accept its revocation lists, other software does not"
            );
        }
        let (Ok(key), true) = (key, errors.is_empty()) else {
            return Err(errors);
        };
        let files = Files {
            own: &own,
            roots: &roots,
            chain: &chain,
            trust_domain,
            now,
        };
        files
            .build(key)
            .map_err(|(name, what)| vec![format!("{}: {what}", directory.join(name).display())])
    }

    /// Warns when less than a fifth of the life is left. Only the operator can replace an intermediate.
    pub(crate) fn warn_before_expiry(&self, now: u64) {
        let life = self.signer.life();
        let left = life.end.saturating_sub(now);
        if left < life.end.saturating_sub(life.begin) / 5 {
            tracing::warn!(
                days_left = left / (24 * 60 * 60),
                "the intermediate CA certificate, or one above it, expires soon: configure a new one"
            );
        }
    }
}

/// What is wrong with the signing certificate itself.
fn check_own(parsed: &X509Certificate<'_>, trust_domain: &TrustDomain, now: u64) -> Vec<String> {
    let mut errors = Vec::new();
    errors.extend(signer::check_may_sign(parsed).err());
    errors.extend(check_valid(parsed, now).err());
    let domain = format!("spiffe://{trust_domain}");
    for uri in signer::uris(parsed) {
        let rest = uri.strip_prefix(&domain);
        if uri.starts_with("spiffe://") && !rest.is_some_and(|r| r.is_empty() || r.starts_with('/'))
        {
            errors.push(format!(
                "has the name {uri:.256?}, but trustDomain is {trust_domain}"
            ));
        }
    }
    errors
}

fn check_valid(certificate: &X509Certificate<'_>, now: u64) -> Result<(), String> {
    let (life, validity) = (signer::life(certificate), certificate.validity());
    if now < life.begin {
        let begin = validity.not_before;
        return Err(format!("the certificate is not valid before {begin}"));
    }
    if now >= life.end {
        let end = validity.not_after;
        return Err(format!("the certificate has expired on {end}"));
    }
    Ok(())
}

/// The parsed files, whose certificates must form a chain.
struct Files<'a> {
    own: &'a CertificateDer<'static>,
    roots: &'a [CertificateDer<'static>],
    chain: &'a [CertificateDer<'static>],
    trust_domain: &'a TrustDomain,
    now: u64,
}

impl Files<'_> {
    /// Signs a certificate that is not used, and verifies it as the daemons do. The verified path is the chain. An
    /// error names its file.
    fn build(&self, key: KeyPair) -> Result<Intermediate, (&'static str, String)> {
        let own = |what: String| (CERTIFICATE, what);
        let life = signer::life(&signer::parse(self.own).map_err(own)?);
        let signer = Signer::new(key, self.own.clone(), Vec::new(), life).map_err(own)?;
        let probe = self
            .probe(&signer)
            .map_err(|error| own(format!("cannot sign: {error}")))?;
        let roots = self.valid_roots()?;
        let anchors: Vec<TrustAnchor<'_>> = roots
            .iter()
            .filter_map(|root| anchor_from_trusted_cert(root).ok())
            .collect();
        let mut above = vec![self.own.clone()];
        above.extend(self.chain.iter().filter(|c| *c != self.own).cloned());
        let leaf = EndEntityCert::try_from(&probe)
            .map_err(|error| own(format!("signs certificates that TLS refuses: {error}")))?;
        let algorithms = aws_lc_rs::default_provider()
            .signature_verification_algorithms
            .all;
        let now = UnixTime::since_unix_epoch(Duration::from_secs(self.now));
        let mut intermediates = Vec::new();
        let mut anchor = None;
        for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
            let path = leaf
                .verify_for_usage(algorithms, &anchors, &above, now, usage, None, None)
                .map_err(|error| self.explain(&error))?;
            let path_ders = path
                .intermediate_certificates()
                .map(|c| c.der().into_owned());
            intermediates = path_ders.collect();
            anchor = roots.iter().position(|root| {
                anchor_from_trusted_cert(root).is_ok_and(|found| found == *path.anchor())
            });
        }
        if intermediates.len() > MAX_INTERMEDIATES {
            let what = format!("has more than {MAX_INTERMEDIATES} certificates below the root");
            return Err((CHAIN, what));
        }
        let anchor = anchor.ok_or_else(|| (ROOTS, "has no usable root".to_owned()))?;
        let mut ordered = vec![roots[anchor].clone()];
        ordered.extend(roots.iter().filter(|root| **root != roots[anchor]).cloned());
        let mut life = life;
        for der in intermediates.iter().chain(&ordered[..1]) {
            let one = signer::life(&signer::parse(der).map_err(own)?);
            life = Life {
                begin: life.begin.max(one.begin),
                end: life.end.min(one.end),
            };
        }
        Ok(Intermediate {
            signer: Arc::new(signer.with_chain(intermediates, life)),
            roots: ordered,
        })
    }

    fn probe(
        &self,
        signer: &Signer,
    ) -> Result<CertificateDer<'static>, Box<dyn std::error::Error>> {
        let identity = self.trust_domain.identity("auth-daemon", "probe")?;
        let key = KeyPair::generate()?;
        let csr = CertificateParams::default().serialize_request(&key)?;
        let key = RequestedKey::from_csr(csr.der())?;
        Ok(signer
            .svid(&identity, &key, Some(Holder::Node("")), 3600, self.now)?
            .certificate)
    }

    /// The roots that may sign now. An expired one beside them must not keep the CA from starting.
    fn valid_roots(&self) -> Result<Vec<CertificateDer<'static>>, (&'static str, String)> {
        let mut valid: Vec<CertificateDer<'static>> = Vec::new();
        let mut refused = String::from("has no certificate");
        for der in self.roots {
            let parsed = signer::parse(der).map_err(|what| (ROOTS, what))?;
            match signer::check_may_sign(&parsed).and_then(|()| check_valid(&parsed, self.now)) {
                Ok(()) if valid.contains(der) => {}
                Ok(()) => valid.push(der.clone()),
                Err(what) => {
                    refused = format!("{}: {what}", parsed.subject());
                    tracing::warn!(subject = %parsed.subject(), "{ROOTS}: root ignored: {what}");
                }
            }
        }
        if valid.is_empty() {
            return Err((ROOTS, refused));
        }
        Ok(valid)
    }

    /// What a failed verification of the chain means for its files.
    fn explain(&self, error: &ChainError) -> (&'static str, String) {
        match error {
            ChainError::UnknownIssuer | ChainError::InvalidSignatureForPublicKey => {
                let what = format!("does not lead from {CERTIFICATE} to a valid root of {ROOTS}");
                (CHAIN, what)
            }
            ChainError::PathLenConstraintViolated => {
                let what = "a CA above allows fewer CAs below it (its path length)";
                (CHAIN, what.into())
            }
            ChainError::CertExpired { .. } | ChainError::CertNotValidYet { .. } => (
                CHAIN,
                "a certificate on the way to the root is not valid now".into(),
            ),
            error => {
                let what = format!("signs certificates that TLS refuses: {error}");
                (CERTIFICATE, what)
            }
        }
    }
}

fn certificates(directory: &Path, name: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = read(&directory.join(name), Readers::Everybody)?;
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| format!("is not PEM: {error}"))?;
    if found.is_empty() && name != CHAIN {
        return Err("has no certificate".into());
    }
    Ok(found)
}

fn read(path: &Path, readers: Readers) -> Result<String, String> {
    files::read_own(path, MAX_BYTES, readers)
        .and_then(|bytes| String::from_utf8(bytes).map_err(io::Error::other))
        .map_err(|error| format!("cannot be read: {error}"))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{fs, os::unix::fs::PermissionsExt, process::Command};

    use super::*;
    use crate::{
        crl,
        state::{CaState, StoredSigner},
    };

    const CA: &str = "basicConstraints=critical,CA:true\nkeyUsage=critical,keyCertSign,cRLSign\n\
                      subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n";
    /// With parameters before the key, as an older command writes them.
    const EC: &str = "ecparam -name prime256v1 -genkey";
    const RSA: &str = "genrsa -traditional 2048";

    fn openssl(directory: &Path, arguments: &str) {
        let mut command = Command::new("openssl");
        command.args(arguments.split(' ')).current_dir(directory);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{arguments}: {output:?}");
    }

    /// Signs `name`.pem for a new key, which the openssl command `key` makes, with `issuer`'s key.
    fn sign(dir: &Path, name: &str, subject: &str, issuer: &str, extensions: &str, key: &str) {
        let (command, options) = key.split_once(' ').unwrap();
        openssl(dir, &format!("{command} -out {name}.key {options}"));
        openssl(
            dir,
            &format!("req -new -key {name}.key -subj {subject} -out {name}.csr"),
        );
        fs::write(dir.join("extensions"), extensions).unwrap();
        let by = match issuer == name {
            true => format!("-signkey {name}.key"),
            false => format!("-CA {issuer}.pem -CAkey {issuer}.key -CAcreateserial"),
        };
        openssl(
            dir,
            &format!("x509 -req -in {name}.csr -extfile extensions -days 30 -out {name}.pem {by}"),
        );
    }

    /// A folder made by Istio's instructions: a root, the company's intermediate, and one for the cluster. Their names
    /// have one part twice.
    pub(crate) fn istio(directory: &Path) {
        make(
            directory,
            EC,
            "",
            "spiffe://cluster.local/ns/istio-system/sa/citadel",
        );
    }

    fn make(dir: &Path, key: &str, extensions: &str, uri: &str) {
        sign(dir, "root", "/O=Example/CN=Root", "root", CA, EC);
        sign(
            dir,
            "middle",
            "/DC=com/DC=example/CN=Middle",
            "root",
            CA,
            EC,
        );
        let extensions = format!("{CA}subjectAltName=URI:{uri}\n{extensions}");
        sign(
            dir,
            "ca",
            "/DC=com/DC=example/CN=Cluster",
            "middle",
            &extensions,
            key,
        );
        copy(
            dir,
            &[
                ("ca.pem", CERTIFICATE),
                ("ca.key", KEY),
                ("root.pem", ROOTS),
            ],
        );
        concat(dir, &["ca.pem", "middle.pem", "root.pem"], CHAIN);
    }

    fn copy(dir: &Path, files: &[(&str, &str)]) {
        for (from, to) in files {
            concat(dir, &[from], to);
        }
    }

    fn concat(dir: &Path, from: &[&str], to: &str) {
        let parts = from
            .iter()
            .map(|name| fs::read_to_string(dir.join(name)).unwrap());
        fs::write(dir.join(to), parts.collect::<String>()).unwrap();
        if to == KEY {
            fs::set_permissions(dir.join(KEY), fs::Permissions::from_mode(0o600)).unwrap();
        }
    }

    fn now() -> u64 {
        auth_tunnel::tls::unix_seconds(std::time::SystemTime::now())
    }

    fn load(directory: &Path, now: u64) -> Result<Intermediate, Vec<String>> {
        Intermediate::load(directory, &"cluster.local".parse().unwrap(), now)
    }

    #[test]
    fn accepts_common_layouts() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        for key in [
            EC,
            RSA,
            "genpkey -algorithm ED25519",
            "genpkey -algorithm RSA",
        ] {
            make(dir, key, "", "spiffe://cluster.local");
            let loaded = load(dir, now()).unwrap();
            assert_eq!(loaded.signer.intermediates().len(), 2);
            assert_eq!(loaded.roots.len(), 1);
        }
        // Without the root and the certificate itself, out of order, with a second root.
        copy(dir, &[("middle.pem", CHAIN)]);
        load(dir, now()).unwrap();
        concat(dir, &["root.pem", "middle.pem", "ca.pem"], CHAIN);
        sign(dir, "next", "/CN=Next", "next", CA, EC);
        concat(dir, &["next.pem", "root.pem"], ROOTS);
        let loaded = load(dir, now()).unwrap();
        assert_eq!(loaded.signer.intermediates().len(), 2);
        assert_eq!(loaded.roots.len(), 2);
        let root = CertificateDer::from_pem_file(dir.join("root.pem")).unwrap();
        assert_eq!(
            loaded.roots[0], root,
            "the one above the signer comes first"
        );
        // The middle one as the root.
        copy(dir, &[("middle.pem", ROOTS)]);
        assert_eq!(load(dir, now()).unwrap().signer.intermediates().len(), 1);
        // A root that signs leaves directly.
        fs::write(dir.join(CHAIN), "").unwrap();
        copy(
            dir,
            &[
                ("root.pem", ROOTS),
                ("root.pem", CERTIFICATE),
                ("root.key", KEY),
            ],
        );
        assert!(load(dir, now()).unwrap().signer.intermediates().is_empty());
    }

    #[test]
    fn reports_errors_with_their_files() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let errors = |at| load(dir, at).err().unwrap().join("\n");
        let missing = errors(now());
        for file in [CERTIFICATE, KEY, ROOTS, CHAIN] {
            let expected = format!("{file}: cannot be read");
            assert!(missing.contains(&expected), "{missing}");
        }
        let broken = |expected: &str, change: &dyn Fn()| {
            istio(dir);
            change();
            let found = errors(now());
            assert!(found.contains(expected), "{expected} in\n{found}");
        };
        let write = |name: &str, content: &str| fs::write(dir.join(name), content).unwrap();
        let expose = || {
            let mode = fs::Permissions::from_mode(0o644);
            fs::set_permissions(dir.join(KEY), mode).unwrap();
        };
        broken("mode 644", &expose);
        broken("defaultMode: 0400", &expose);
        broken("not the key of ca-cert.pem", &|| {
            copy(dir, &[("middle.key", KEY)])
        });
        broken("ca-key.pem: has no usable private key", &|| write(KEY, "x"));
        broken("root-cert.pem: has no certificate", &|| write(ROOTS, ""));
        let no_chain = "does not lead from ca-cert.pem to a valid root";
        broken(no_chain, &|| copy(dir, &[("ca.pem", CHAIN)]));
        broken(no_chain, &|| {
            sign(dir, "other", "/O=Example/CN=Root", "other", CA, EC);
            copy(dir, &[("other.pem", ROOTS)]);
        });
        broken("lacks CA:TRUE", &|| {
            let leaf = "basicConstraints=CA:false\nkeyUsage=digitalSignature";
            sign(dir, "leaf", "/CN=Leaf", "middle", leaf, EC);
            copy(dir, &[("leaf.pem", CERTIFICATE), ("leaf.key", KEY)]);
        });
        broken("path length", &|| {
            let short = CA.replace("CA:true", "CA:true,pathlen:0");
            let middle = "/DC=com/DC=example/CN=Middle";
            sign(dir, "middle", middle, "root", &short, EC);
            sign(dir, "ca", "/CN=Cluster", "middle", CA, EC);
            let files = [
                ("ca.pem", CERTIFICATE),
                ("ca.key", KEY),
                ("middle.pem", CHAIN),
            ];
            copy(dir, &files);
        });
        make(dir, EC, "", "spiffe://example.org/ns/a/sa/b");
        assert!(errors(now()).contains("trustDomain is cluster.local"));
        make(
            dir,
            EC,
            "extendedKeyUsage=codeSigning\n",
            "spiffe://cluster.local",
        );
        let found = errors(now());
        assert!(found.contains("TLS refuses"), "{found}");
        istio(dir);
        assert!(errors(now() - 3600 * 24).contains("not valid before"));
        assert!(errors(now() + 3600 * 24 * 31).contains("has expired on"));
        let loaded = load(dir, now() + 3600 * 24 * 29).unwrap();
        loaded.warn_before_expiry(now());
    }

    #[test]
    fn signs_revocation_lists_without_crl_sign() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let usage = "digitalSignature,nonRepudiation,keyEncipherment,keyCertSign";
        let istio = CA.replace("keyCertSign,cRLSign", usage);
        sign(dir, "root", "/O=Istio/CN=Root", "root", CA, EC);
        sign(
            dir,
            "ca",
            "/O=Istio/CN=Intermediate/L=cluster1",
            "root",
            &istio,
            RSA,
        );
        let files = [
            ("ca.pem", CERTIFICATE),
            ("ca.key", KEY),
            ("root.pem", ROOTS),
        ];
        copy(dir, &files);
        copy(dir, &[("ca.pem", CHAIN)]);
        let loaded = load(dir, now()).unwrap();
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        let state = CaState::new(&domain, StoredSigner::intermediate(&loaded.signer, 60));
        let der = crl::write(&state, &loaded.signer, now()).unwrap();
        let signers = [loaded.signer.certificate().clone()];
        assert_eq!(auth_tunnel::tls::crl::read(&der, &signers), Ok(Vec::new()));
    }
}
