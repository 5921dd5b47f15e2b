//! Guest memory layout, boot protocols, CPUID and ACPI: numbers in, bytes and register values out.
