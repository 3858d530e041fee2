//! Certificates for peers: PEM, or rustls configurations of the program's own; both can be replaced while the node runs.
//!
//! tonic keeps the configuration that it was given at the start, so encryption is done here, below it: each new connection, in and out,
//! uses the newest one, and connections that are open stay as they are.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tokio::net::TcpStream;
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::transport::{Channel, Endpoint, Uri};

use super::listener::Connection;
use crate::config::PeerTls;

/// HTTP/2, as both sides must name it.
const ALPN_H2: &[u8] = b"h2";
/// How long the other side may take to agree.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Both directions.
#[derive(Clone, Debug)]
struct Configs {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

/// The configurations in force; clones share them. None: connections are plain.
#[derive(Clone, Debug, Default)]
pub struct Tls {
    now: Option<Arc<RwLock<Configs>>>,
}

impl Tls {
    /// From PEM: both sides prove who they are to the other.
    ///
    /// # Errors
    /// A sentence that says which part is wrong.
    pub fn from_pem(pem: &PeerTls) -> Result<Self, String> {
        let (server, client) = from_pem(pem)?;
        Ok(Self::from_configs(server, client))
    }

    /// From the program's own; HTTP/2 is added to the protocols they name.
    pub fn from_configs(server: ServerConfig, client: ClientConfig) -> Self {
        Self { now: Some(Arc::new(RwLock::new(configs(server, client)))) }
    }

    /// Of a program that only connects.
    pub fn of_client(client: ClientConfig) -> Self {
        let provider = client.crypto_provider().clone();
        let server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&tokio_rustls::rustls::version::TLS13])
            .map(|builder| builder.with_no_client_auth().with_cert_resolver(Arc::new(NoCertificate)));
        match server {
            Ok(server) => Self::from_configs(server, client),
            Err(_) => Self::default(),
        }
    }

    /// From now on for new connections.
    ///
    /// # Errors
    /// As [`Self::from_pem`], or when the node was started without TLS; what was in force stays.
    pub fn replace_pem(&self, pem: &PeerTls) -> Result<(), String> {
        let (server, client) = from_pem(pem)?;
        self.replace(server, client)
    }

    /// From now on for new connections.
    ///
    /// # Errors
    /// When the node was started without TLS.
    pub fn replace(&self, server: ServerConfig, client: ClientConfig) -> Result<(), String> {
        let now = self.now.as_ref().ok_or("this node was started without TLS for peers: start it with certificates")?;
        *now.write() = configs(server, client);
        Ok(())
    }

    /// Whether connections are encrypted.
    pub fn is_on(&self) -> bool {
        self.now.is_some()
    }

    /// The server's end of a connection.
    pub async fn accept(&self, connection: Connection) -> io::Result<Connection> {
        let Some(now) = &self.now else { return Ok(connection) };
        let server = now.read().server.clone();
        let agreed = tokio::time::timeout(HANDSHAKE_TIMEOUT, TlsAcceptor::from(server).accept(connection));
        Ok(Connection::new(agreed.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??))
    }

    /// A channel to `url` that connects when it is first used, and again whenever it has to.
    ///
    /// # Errors
    /// A sentence when `url` is no address, or https without certificates.
    pub fn channel(&self, url: &str, configure: impl FnOnce(Endpoint) -> Endpoint) -> Result<Channel, String> {
        let not_an_address = |error: &dyn std::fmt::Display| format!("{url:?} is no peer address: {error}");
        let Some(rest) = url.strip_prefix("https://") else {
            let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|error| not_an_address(&error))?;
            return Ok(configure(endpoint).connect_lazy());
        };
        let now = self
            .now
            .clone()
            .ok_or_else(|| format!("{url} is encrypted, and this node has no certificates for peers: give it some"))?;
        let origin: Uri = url.parse().map_err(|error| not_an_address(&error))?;
        let host = origin.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let name = ServerName::try_from(host).map_err(|error| not_an_address(&error))?;
        // tonic refuses https when somebody else encrypts: it is told http, and the requests name the origin.
        let endpoint = Endpoint::from_shared(format!("http://{rest}")).map_err(|error| not_an_address(&error))?;
        let connector = tower::service_fn(move |uri: Uri| {
            let (now, name) = (now.clone(), name.clone());
            async move {
                let authority = uri.authority().map(|authority| authority.as_str().to_owned()).unwrap_or_default();
                let stream = TcpStream::connect(authority).await?;
                stream.set_nodelay(true)?;
                let client = now.read().client.clone();
                let stream = TlsConnector::from(client).connect(name, stream).await?;
                Ok::<_, io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        });
        Ok(configure(endpoint.origin(origin)).connect_with_connector_lazy(connector))
    }
}

fn configs(mut server: ServerConfig, mut client: ClientConfig) -> Configs {
    for protocols in [&mut server.alpn_protocols, &mut client.alpn_protocols] {
        if !protocols.iter().any(|protocol| protocol == ALPN_H2) {
            protocols.push(ALPN_H2.to_vec());
        }
    }
    Configs { server: Arc::new(server), client: Arc::new(client) }
}

fn from_pem(pem: &PeerTls) -> Result<(ServerConfig, ClientConfig), String> {
    let provider = CryptoProvider::get_default()
        .cloned()
        .unwrap_or_else(|| Arc::new(tokio_rustls::rustls::crypto::ring::default_provider()));
    let certificates = |pem: &[u8], what: &str| -> Result<Vec<CertificateDer<'static>>, String> {
        let found = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
        match found {
            Ok(found) if found.is_empty() => Err(format!("peer TLS: {what} has no certificate in PEM")),
            found => found.map_err(|error| format!("peer TLS: {what}: {error}")),
        }
    };
    let chain = certificates(&pem.certificate_pem, "the certificate")?;
    let key = PrivateKeyDer::from_pem_slice(&pem.key_pem).map_err(|error| format!("peer TLS: the key: {error}"))?;
    let mut roots = RootCertStore::empty();
    for authority in certificates(&pem.authority_pem, "the authority")? {
        roots.add(authority).map_err(|error| format!("peer TLS: the authority: {error}"))?;
    }
    let roots = Arc::new(roots);
    let failed = |error: &dyn std::fmt::Display| format!("peer TLS: {error}");
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
        .build()
        .map_err(|error| failed(&error))?;
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| failed(&error))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain.clone(), key.clone_key())
        .map_err(|error| failed(&error))?;
    let client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| failed(&error))?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .map_err(|error| failed(&error))?;
    Ok((server, client))
}

/// For who takes no connections.
#[derive(Debug)]
struct NoCertificate;

impl tokio_rustls::rustls::server::ResolvesServerCert for NoCertificate {
    fn resolve(
        &self,
        _hello: tokio_rustls::rustls::server::ClientHello<'_>,
    ) -> Option<Arc<tokio_rustls::rustls::sign::CertifiedKey>> {
        None
    }
}
