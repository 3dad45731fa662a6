"""Certificates for tests, good ones and each kind of bad one, made by an authority of the test's own."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from peermem.credentials.trial import Pair, fingerprint_of

PATTERN = "spiffe://example.org/peermem/{node}"
HOUR = datetime.timedelta(hours=1)
NOW = datetime.datetime.now(datetime.UTC)


_SIGNS = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, PEM."""

    pem: bytes
    key: bytes
    authority: Authority

    @property
    def pair(self) -> Pair:
        return Pair(self.pem, self.key, self.authority.pem)

    @property
    def fingerprint(self) -> str:
        der = x509.load_pem_x509_certificate(self.pem).public_bytes(serialization.Encoding.DER)
        return fingerprint_of(der)

    def write(self, folder: Path) -> Path:
        """Write cert.pem, key.pem and ca.pem, each at once, and return the folder."""
        folder.mkdir(exist_ok=True)
        for name, data in (("cert.pem", self.pem), ("key.pem", self.key), ("ca.pem", self.authority.pem)):
            fresh = folder / f".{name}"
            fresh.write_bytes(data)
            fresh.rename(folder / name)
        return folder


@dataclass
class Authority:
    """Signs whatever a test asks for."""

    name: str = "authority"
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        self.certificate = (
            _builder(subject, self.key, NOW - 24 * HOUR, NOW + 240 * HOUR)
            .issuer_name(subject)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(
        self,
        *ids: str,
        dns: str | None = "peermem.test",
        ip: str | None = None,
        common: str | None = None,
        begin: datetime.datetime = NOW - HOUR,
        end: datetime.datetime = NOW + 24 * HOUR,
        server: bool = True,
    ) -> Certificate:
        """Return a certificate with these URIs, which may be used by clients, and by a `server`."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)] if common else [])
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(each) for each in ids]
        names += [x509.DNSName(dns)] if dns else []
        names += [x509.IPAddress(ipaddress.ip_address(ip))] if ip else []
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if server else [])]
        builder = _builder(subject, key, begin, end).issuer_name(self.certificate.subject)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_SIGNS, critical=True)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=not common)
        signed = builder.sign(self.key, hashes.SHA256())
        return Certificate(
            signed.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            self,
        )

    def node(self, node: str) -> Certificate:
        """Return the certificate of a node."""
        return self.issue(PATTERN.format(node=node))


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePrivateKey, begin: datetime.datetime, end: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
    )
